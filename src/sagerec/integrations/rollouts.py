"""Rollouts by another engine, updates by us: what vLLM or SGLang needs of a policy, and what comes back.

    FOLDER/model            the causal language model and its tokenizer, as Hugging Face has them
    FOLDER/legal.jsonl      a line an item: {"item", "tokens", "text"}
    FOLDER/structured.json  what holds the engine to them: {"choice": […]} for one item, {"grammar": EBNF} for several
    FOLDER/prompts.jsonl    a line a prompt: {"id", "prompt_token_ids", "n"}

The engine writes a line a completion, {"id", "token_ids", "logprobs"}, the end token last. Its log-probabilities are
those of other kernels, and perhaps of the whole vocabulary; ours, normalised over what is legal, are computed again,
and an update uses them as the old ones. How far the two are apart is logged (`mismatch`).

An engine is held to texts, and may write a text by other tokens than the catalogue has: such a completion is dropped.

Shapes: B prompts, G completions of each, n of them together, T tokens of the longest, K items.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagerec.artifacts import read_manifest, write_artifact
from sagerec.config import require
from sagerec.errors import ArtifactError, TrieError
from sagerec.integrations.legal_tokens import LegalTokens

logger = logging.getLogger(__name__)
KIND = "rollout_export"
LEGAL, STRUCTURED, PROMPTS = "legal.jsonl", "structured.json", "prompts.jsonl"
ROUNDING = 0.01
"""Nats by which an engine's log-probabilities may lie above 0."""


@dataclass(frozen=True, slots=True)
class EngineRollouts:
    """Completions of an engine that are in the catalogue."""

    prompt: Tensor
    """(n,) int64 position of each completion's prompt, ascending."""
    completions: Tensor
    """(n, T) int64 token ids, the end token last, then 0."""
    counted: Tensor
    """(n, T) bool: a token stands."""
    logprobs: Tensor
    """(n, T) float32 nats, as the engine has them; 0 after the end."""
    items: Tensor
    """(n, K) items."""
    dropped: int
    """Completions that were cut short, or whose tokens are no item's."""


def write_export(
    folder: Path, model: Any, tokenizer: Any, legal: LegalTokens, prompts: Sequence[Sequence[int]], *, group: int
) -> None:
    """Write all that an engine needs to roll out `group` completions of each prompt (its token ids).

    Raises: SettingsError for a model that cannot be saved, or an empty prompt; ArtifactError for another folder.
    """
    require(
        hasattr(model, "save_pretrained"),
        f"the policy is a {type(model).__name__}; expected a causal language model of transformers, which engines "
        "serve",
    )
    require(group >= 1, f"group is {group}; expected at least 1")
    require(all(map(len, prompts)), "a prompt is empty; expected at least one token in each")
    sequences = [legal.space.sequence(item) for item in range(legal.space.n_items)]
    texts = [tokenizer.decode(tokens) for tokens in sequences]
    with write_artifact(folder, KIND, sizes={"prompts": len(prompts), "group": group, "items": len(texts)}) as fresh:
        model.save_pretrained(str(fresh / "model"))
        tokenizer.save_pretrained(str(fresh / "model"))
        rows = zip(sequences, texts, strict=True)
        _write_lines(fresh / LEGAL, [{"item": i, "tokens": s, "text": t} for i, (s, t) in enumerate(rows)])
        structured = {"choice": texts} if legal.k == 1 else {"grammar": _grammar(texts, legal.k)}
        (fresh / STRUCTURED).write_text(json.dumps(structured, ensure_ascii=False), encoding="utf-8")
        asked = [{"id": i, "prompt_token_ids": list(map(int, p)), "n": group} for i, p in enumerate(prompts)]
        _write_lines(fresh / PROMPTS, asked)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _grammar(texts: Sequence[str], k: int) -> str:
    """K items one after another in EBNF, as xgrammar has it; that none stands twice is checked when they are read."""
    items = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return f"root ::= {' '.join(['item'] * k)}\nitem ::= {items}\n"


def read_completions(folder: Path, completions: Path, legal: LegalTokens) -> EngineRollouts:
    """What an engine wrote for the export in `folder`.

    Raises: ArtifactError for a line that is none, an unknown prompt, or a log-probability that cannot be; where no
    completion is left.
    """
    n_prompts = int(read_manifest(folder, KIND).sizes["prompts"])
    kept: list[tuple[int, list[int], list[float], list[int]]] = []
    dropped = 0
    for number, line in enumerate(_read_text(completions).rstrip().split("\n"), start=1):
        prompt, tokens, logprobs = _read_line(line, f"{completions}, line {number}", n_prompts)
        items = legal.read(tokens)
        if min(items) < 0 or len(set(items)) < legal.k or tokens != _tokens(legal, items):
            dropped += 1
        else:
            kept.append((prompt, tokens, logprobs, items))
    if not kept:
        raise ArtifactError(
            f"{completions}: none of {dropped} completions is in the catalogue; expected an engine that is held to it"
        )
    if dropped:
        logger.warning("%s: %d of %d completions are not in the catalogue", completions, dropped, dropped + len(kept))
    kept.sort(key=lambda row: row[0])
    ids, values = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[place]) for row in kept], batch_first=True)
        for place in (1, 2)
    )
    lengths = torch.tensor([len(row[1]) for row in kept])
    return EngineRollouts(
        prompt=torch.tensor([row[0] for row in kept]),
        completions=ids,
        counted=torch.arange(ids.shape[1]) < lengths[:, None],
        logprobs=values.float(),
        items=torch.tensor([row[3] for row in kept]),
        dropped=dropped,
    )


def _read_text(path: Path) -> str:
    """A text file. Raises: ArtifactError for one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 ({error}); expected what the engine wrote, whole") from error


def _tokens(legal: LegalTokens, items: Sequence[int]) -> list[int]:
    """The completion that holds the items."""
    return [*(token for item in items for token in legal.space.sequence(item)), legal.end]


def _read_line(line: str, where: str, n_prompts: int) -> tuple[int, list[int], list[float]]:
    """Prompt, token ids and log-probabilities of a line. Raises: ArtifactError."""
    expected = 'expected {"id": int, "token_ids": [int, …], "logprobs": [number, …]} of as many entries'
    try:
        row = json.loads(line)
        prompt, tokens, logprobs = row["id"], row["token_ids"], row["logprobs"]
        ids = all(type(t) is int and 0 <= t < 2**31 for t in tokens)
        fits = type(prompt) is int and ids and len(tokens) == len(logprobs) > 0
        numbers = [float(value) for value in logprobs]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{where} cannot be read ({error}); {expected}") from error
    if not fits:
        raise ArtifactError(f"{where} does not fit; {expected}")
    if not 0 <= prompt < n_prompts:
        raise ArtifactError(f"{where} is of prompt {prompt}; expected 0 to {n_prompts - 1}")
    if bad := [value for value in numbers if not math.isfinite(value) or value > ROUNDING]:
        raise ArtifactError(f"{where} has the log-probability {bad[0]}; expected a finite number of at most 0")
    return prompt, tokens, numbers


def mismatch(engine: EngineRollouts, recomputed: Tensor, free: Tensor) -> dict[str, float]:
    """How far an engine's log-probabilities are from ours (n, T), over free tokens (n, T), where the two should agree.

    In nats: the mean and largest difference of a token; quantiles of r = exp(mean_t difference) of a completion; an
    estimate of KL(engine || ours). An engine that normalises over its whole vocabulary is below ours throughout.
    """
    difference = (recomputed.detach() - engine.logprobs.to(recomputed)) * free
    counts = free.sum(dim=1)
    ratio = (difference.sum(dim=1) / counts.clamp(min=1))[counts > 0].exp()
    low, middle, high = torch.quantile(ratio, ratio.new_tensor([0.05, 0.5, 0.95])).tolist()
    n = free.sum().clamp(min=1)
    found = {
        "mean_nats": float(difference.abs().sum() / n),
        "largest_nats": float(difference.abs().max()),
        "signed_nats": float(difference.sum() / n),
        "kl_nats": float(((difference.exp() - difference - 1) * free).sum() / n),
        "ratio_q05": low,
        "ratio_q50": middle,
        "ratio_q95": high,
        "dropped": float(engine.dropped),
    }
    logger.info("engine and policy: %s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found


def score_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    engine: EngineRollouts,
    legal: LegalTokens,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Our log-probabilities (n, T) of an engine's completions, with gradient, and which tokens are free (n, T).

    Raises: TrieError for a completion that is not in the catalogue.
    """
    if not len(engine.completions):
        raise TrieError("there is no completion; expected at least one")
    rows = [torch.tensor(list(prompts[i])) for i in engine.prompt.tolist()]
    width, length = max(map(len, rows)), engine.completions.shape[1]
    padded = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    seen = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    device = next(model.parameters()).device
    ids = torch.cat([padded, engine.completions], dim=1).to(device)
    mask = torch.cat([seen, engine.counted.long()], dim=1).to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -length - 1 : -1] / temperature
    counted = engine.counted.to(device)
    scored = legal.score(logits, ids[:, -length:], counted)
    return scored.logprobs, legal.follow(ids[:, -length:], counted).free

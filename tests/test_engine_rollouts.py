"""Rollouts by an engine and back. No vLLM is here: Hugging Face's `generate` plays the engine, from the files alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sagerec.errors import ArtifactError, SettingsError
from sagerec.integrations.legal_tokens import LegalTokens
from sagerec.integrations.rollouts import mismatch, read_completions, score_completions, write_export
from sagerec.objectives.loss import compute_advantages, policy_loss
from tests.tiny_qwen import END, SEQUENCES, SPACE, make_model, make_tokenizer

pytest.importorskip("transformers")
PROMPT_IDS = [[2, 10, 3, 12], [5, 11], [4, 12, 2, 11]]
G = 6


def play_engine(folder: Path, out: Path) -> None:
    """Samples under a prefix constraint made of legal.jsonl, and writes the processed log-probabilities."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    sequences = [[*json.loads(line)["tokens"], END] for line in (folder / "legal.jsonl").read_text().splitlines()]
    torch.manual_seed(0)
    lines = []
    for line in (folder / "prompts.jsonl").read_text().splitlines():
        asked = json.loads(line)
        prompt = torch.tensor([asked["prompt_token_ids"]])

        def allowed(_: int, ids: torch.Tensor, width: int = prompt.shape[1]) -> list[int]:
            done = ids[width:].tolist()
            return sorted({s[len(done)] for s in sequences if s[: len(done)] == done and len(s) > len(done)}) or [END]

        made = model.generate(
            prompt,
            do_sample=True,
            top_k=0,
            num_return_sequences=asked["n"],
            max_new_tokens=5,
            prefix_allowed_tokens_fn=allowed,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = torch.stack(made.scores, dim=1).log_softmax(-1)
        for row, values in zip(made.sequences[:, prompt.shape[1] :].tolist(), scores, strict=True):
            tokens = row[: row.index(END) + 1]
            found = [float(values[t, token]) for t, token in enumerate(tokens)]
            lines.append(json.dumps({"id": asked["id"], "token_ids": tokens, "logprobs": found}))
    out.write_text("\n".join(reversed(lines)), encoding="utf-8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "export"
    write_export(folder, make_model(), make_tokenizer(), LegalTokens(SPACE, END), PROMPT_IDS, group=G)
    play_engine(folder, folder.parent / "completions.jsonl")
    return folder


def test_completions_come_back_with_the_log_probabilities_that_we_compute(exported: Path) -> None:
    """The same weights: no mismatch. Other weights: one that is logged; and an update on them lowers its loss."""
    legal = LegalTokens(SPACE, END)
    engine = read_completions(exported, exported.parent / "completions.jsonl", legal)
    assert engine.prompt.tolist() == sorted([0, 1, 2] * G)
    assert engine.dropped == 0
    assert [SEQUENCES[i] for i in engine.items[:, 0].tolist()] == [
        row[: row.index(END)] for row in engine.completions.tolist()
    ]
    model = make_model()
    ours, free = score_completions(model, PROMPT_IDS, engine, legal)
    same = mismatch(engine, ours, free)
    assert same["largest_nats"] < 1e-4
    assert same["ratio_q05"] == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved = mismatch(engine, score_completions(model, PROMPT_IDS, engine, legal)[0], free)
    assert moved["mean_nats"] > 0.01
    assert moved["kl_nats"] > 0
    assert moved["ratio_q05"] < 1 < moved["ratio_q95"]

    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    advantages = compute_advantages("grpo", (engine.items % 2).float().view(3, G, 1))
    old = score_completions(model, PROMPT_IDS, engine, legal)[0].detach()
    for _ in range(3):
        new = score_completions(model, PROMPT_IDS, engine, legal)[0]
        shaped: dict[str, Any] = {"logprobs": new.view(3, G, -1), "old_logprobs": old.view(3, G, -1)}
        loss = policy_loss("grpo", **shaped, mask=free.view(3, G, -1), advantages=advantages).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


def test_the_folder_says_what_is_legal(exported: Path) -> None:
    lines = [json.loads(line) for line in (exported / "legal.jsonl").read_text().splitlines()]
    assert lines[4] == {"item": 4, "tokens": [4, 13, 20], "text": "w4 w13 w20"}
    assert json.loads((exported / "structured.json").read_text())["choice"][7] == "w5 w11"
    assert json.loads((exported / "prompts.jsonl").read_text().splitlines()[1]) == {
        "id": 1,
        "prompt_token_ids": [5, 11],
        "n": G,
    }


def test_slates_are_held_by_a_grammar(tmp_path: Path) -> None:
    write_export(tmp_path / "e", make_model(), make_tokenizer(), LegalTokens(SPACE, END, 2), PROMPT_IDS, group=1)
    grammar = json.loads((tmp_path / "e" / "structured.json").read_text())["grammar"]
    assert grammar.startswith('root ::= item item\nitem ::= "w2 w10" | "w2 w11" | ')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 cannot be read"),
        ('{"id": 0, "token_ids": [2, 10, 1]}', "line 1 cannot be read .'logprobs'."),
        ('{"id": 0, "token_ids": [2, 10, 1], "logprobs": [-1, 0]}', "line 1 does not fit; expected"),
        ('{"id": 0, "token_ids": [2, 1180591620717411303424, 1], "logprobs": [-1, -1, 0]}', "line 1 does not fit"),
        ('{"id": 3, "token_ids": [2], "logprobs": [-1]}', "line 1 is of prompt 3; expected 0 to 2"),
        ('{"id": 0, "token_ids": [2], "logprobs": [NaN]}', "line 1 has the log-probability nan; expected a finite"),
        ('{"id": 0, "token_ids": [2, 13, 1], "logprobs": [-1, -1, 0]}', "none of 1 completions is in the catalogue"),
    ],
)
def test_wrong_lines_are_named(line: str, message: str, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        read_completions(exported, path, LegalTokens(SPACE, END))


def test_a_damaged_file_is_refused_and_line_breaks_of_texts_are_none(exported: Path, tmp_path: Path) -> None:
    """A last line that was cut; bytes that are no UTF-8; a separator that JSON may hold within a text."""
    path, legal = tmp_path / "completions.jsonl", LegalTokens(SPACE, END)
    line = json.dumps({"id": 0, "token_ids": [2, 10, END], "logprobs": [-1, -1, 0]})
    path.write_text(f"{line}\n{line[:20]}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="line 2 cannot be read"):
        read_completions(exported, path, legal)
    path.write_bytes(f"{line}\n".encode() + b"\xff\xfe")
    with pytest.raises(ArtifactError, match="is not UTF-8"):
        read_completions(exported, path, legal)
    path.write_text(line[:-1] + ', "text": "a\u2028b"}\n', encoding="utf-8")
    assert len(read_completions(exported, path, legal).completions) == 1


def test_what_is_not_in_the_catalogue_is_dropped_and_counted(exported: Path, tmp_path: Path) -> None:
    """One item; an item without its end; one that goes on."""
    rows = [[2, 10, END], [2, 10], [2, 10, END, 3]]
    path = tmp_path / "completions.jsonl"
    lines = [json.dumps({"id": 0, "token_ids": row, "logprobs": [-0.5] * len(row)}) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    engine = read_completions(exported, path, LegalTokens(SPACE, END))
    assert (len(engine.completions), engine.dropped) == (1, 2)


def test_a_policy_that_no_engine_serves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the policy is a Linear; expected a causal language model of transformers"):
        write_export(tmp_path, torch.nn.Linear(1, 1), None, LegalTokens(SPACE, END), PROMPT_IDS, group=1)

"""Judges of texts, for item_understand and rec_reason: a local model for BERTScore, or a language model behind HTTP.

Both are off unless they are asked for. Neither is the published judge, whose model is a service and whose figures hang
on it: their values compare with each other and with no published ones.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagerec.errors import ArtifactError, MissingExtraError
from sagerec.progress import progress_bar
from sagerec.recif.items import after_thought

KEY_VARIABLE = "SAGEREC_JUDGE_KEY"
"""Environment variable with the endpoint's key."""
BATCH, MOST_TOKENS = 16, 512
TIMEOUT_SECONDS = 120
PROMPT = """You compare a text with a reference. {task} Give a whole number from 1 (nothing in common) to 5 (the same
substance in other words). Ignore wording, and details that do not bear on the substance.

Reference:
{reference}

Text:
{text}

Answer with JSON alone: {{"score": N}}"""
OF_TASK = {
    "item_understand": "Both describe a video: its subject, scenes and events count.",
    "rec_reason": "Both reason why a user takes a video next: the user's motive and the kind of content count.",
}


def greedy_f1(candidate: Tensor, reference: Tensor) -> float:
    """BERTScore's F1 of token vectors (t, D) and (r, D): each token's best cosine, averaged on either side, and the
    harmonic mean of both averages. Zhang et al., ICLR 2020; without idf weights and baseline.
    """
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (candidate, reference))
    cosine = a @ b.T
    precision, recall = cosine.amax(dim=1).mean().item(), cosine.amax(dim=0).mean().item()
    total = precision + recall
    return 2 * precision * recall / total if total > 0 else 0.0


@dataclass(frozen=True)
class BertScore:
    """BERTScore by an encoder in a folder of Hugging Face's layout; the extra `judge`."""

    folder: Path
    """Such as that of bert-base-chinese."""
    layer: int = 9
    """Hidden layer whose vectors are compared; the last one where the model has fewer."""

    @property
    def name(self) -> str:
        return f"BERTScore by {self.folder.name}, layer {self.layer}"

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise MissingExtraError('BERTScore needs transformers; pip install "sagerec[judge]"') from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            return tokenizer, AutoModel.from_pretrained(self.folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.folder} cannot be read as a Hugging Face encoder ({' '.join(str(error).split())[:200]}); give "
                "the folder of one, such as bert-base-chinese"
            ) from error

    @torch.no_grad()
    def _vectors(self, texts: list[str]) -> list[Tensor]:
        """Vectors (t, D) of each text's tokens, without the ones that open and close it."""
        tokenizer, model = self._model
        found: list[Tensor] = []
        for begin in range(0, len(texts), BATCH):
            part = texts[begin : begin + BATCH]
            batch = tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=MOST_TOKENS)
            states = model(**batch, output_hidden_states=True).hidden_states
            vectors = states[min(self.layer, len(states) - 1)]
            found += [row[mask.bool()][1:-1] for row, mask in zip(vectors, batch["attention_mask"], strict=True)]
        return found

    def judge(self, task: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, list[float]]:
        """The F1 of each text and its reference, 0 for an empty one."""
        sides = [self._vectors([after_thought(text) for text in side]) for side in zip(*pairs, strict=True)]
        values = [
            greedy_f1(text, reference) if len(text) and len(reference) else 0.0
            for text, reference in zip(*sides, strict=True)
        ]
        return "bertscore_f1", values


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A language model behind an OpenAI-compatible endpoint, which gives each text 1 to 5."""

    url: str
    """Such as http://localhost:8000/v1; its key is taken from SAGEREC_JUDGE_KEY."""
    model: str
    """As the endpoint names it."""

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def judge(self, task: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, list[float]]:
        """A whole number from 1 to 5 for each text, 0 for an empty one. Raises: ArtifactError."""
        values = []
        with progress_bar(f"{task} judged", len(pairs)) as bar:
            for done, (text, reference) in enumerate(pairs, 1):
                text = after_thought(text)
                values.append(self._ask(OF_TASK[task], text, reference) if text else 0.0)
                bar.update(done)
        return "judge_score", values

    def _ask(self, task: str, text: str, reference: str) -> float:
        prompt = PROMPT.format(task=task, reference=reference, text=text)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        if not self.url.startswith(("http://", "https://")):
            raise ArtifactError(f"the judge is at {self.url!r}; expected http://… or https://…")
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                said = json.loads(response.read())["choices"][0]["message"]["content"]
        except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ArtifactError(f"the judge at {self.url} does not answer ({error}); look at the endpoint") from error
        return read_score(str(said), self.url)


def read_score(said: str, where: str) -> float:
    """The number in a judge's answer. Raises: ArtifactError where there is none from 1 to 5."""
    found = re.search(r'"score"\s*:\s*([1-5])\b', after_thought(said))
    if found is None:
        raise ArtifactError(f'the judge at {where} said {said[:100]!r}; expected {{"score": 1}} to {{"score": 5}}')
    return float(found[1])

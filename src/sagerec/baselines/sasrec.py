"""SASRec with a full or sampled softmax: the baseline to beat, in the same harness.

Kang and McAuley (2018), as the PyTorch port of their code has it: the layer of `sasrec_layer`, and positions that count
back from the latest item. With the softmax loss that makes it strong (Klenitskiy and Vasilev 2023; Petrov and Macdonald
2023), Adam at a constant rate, and dropout of the item embeddings where they are scored too, without which it overfits
(docs/log.md).

Shapes: B users, T history items, N items, D width.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sagerec.artifacts import read_manifest, write_artifact
from sagerec.baselines.sasrec_layer import SasRecLayer
from sagerec.catalogue.audit import write_events_used
from sagerec.catalogue.splits import Cases, Part, Sequences
from sagerec.config import at_least, from_json, require, to_json
from sagerec.errors import ArtifactError
from sagerec.evaluation.per_case import validation_means
from sagerec.policies.layers import FastDropout, check_shape
from sagerec.policies.softmax import full_softmax_loss, sampled_softmax_loss
from sagerec.training.batches import make_windows
from sagerec.training.checkpoints import fingerprint, working_folder
from sagerec.training.loop import choose_device, fit, validation_sample
from sagerec.training.settings import TrainSettings
from sagerec.training.tracking import keep_records

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class SasRecSettings:
    """Shape of the baseline."""

    width: int = 64
    """Width of every layer."""
    layers: int = 1
    """Causal layers."""
    heads: int = 1
    """Attention heads."""
    dropout: float = 0.2
    """Dropout of item embeddings, read and scored, of attention and of the feed-forward layer."""
    max_items: int = 50
    """History items read, the latest ones."""
    sampled: int = 0
    """Negatives of a sampled softmax, drawn for each position; 0 scores the whole catalogue."""

    def __post_init__(self) -> None:
        check_shape(self, layers=at_least(1, 128), sampled=at_least(0))


TUNED = TrainSettings(
    epochs=70,
    batch_size=128,
    learning_rate=1e-3,
    weight_decay=0.0,
    warmup_share=0.0,
    final_rate_share=1.0,
    like_lengths=False,
    validate_every=5,
    patience=5,
    precision="float32",
)
"""Training settings that made it strong on Amazon Beauty (docs/log.md)."""


ENCODED_ROWS = 32
"""Rows that are encoded at a time, of like length, so that little is padded."""


class SasRec(nn.Module):
    """A causal encoder over item embeddings whose state is scored against them."""

    def __init__(self, settings: SasRecSettings, n_items: int) -> None:
        super().__init__()
        self.settings = settings
        self.items = nn.Embedding(n_items, settings.width)
        self.positions = nn.Embedding(settings.max_items, settings.width)
        self.layers = nn.ModuleList(
            SasRecLayer(width=settings.width, heads=settings.heads, dropout=settings.dropout)
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.width)
        self.dropout = FastDropout(settings.dropout)
        for matrix in (p for p in self.parameters() if p.ndim > 1):
            nn.init.xavier_normal_(matrix)

    @property
    def device(self) -> torch.device:
        return self.items.weight.device

    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        """States (B, T, D) after each item of sequences (B, T) whose first `lengths` (B,) places count."""
        back = lengths[:, None] - 1 - torch.arange(items.shape[1], device=items.device)
        x = self.dropout(self.dropout(self.items(items)) + self.positions(back.clamp(min=0)))
        for layer in self.layers:
            x = layer(x, self.settings.max_items - lengths)
        states: Tensor = self.norm(x)
        return states

    def loss(self, inputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Cross-entropy in nats an item over all items, or over the target and each position's uniform sample.

        Rows are encoded a few of like length at a time, for batches hold rows of any length.
        """
        lengths, encoded, kept = counted.sum(dim=1), [], []
        for rows in torch.split(lengths.argsort(stable=True), ENCODED_ROWS):
            places = counted[rows, : int(lengths[rows].max())]
            longest = places.shape[1]
            encoded.append(self.encode(inputs[rows, :longest], lengths[rows])[places])
            kept.append(targets[rows, :longest][places])
        states, wanted, items = torch.cat(encoded), torch.cat(kept), self.dropout(self.items.weight)
        if self.settings.sampled == 0:
            return full_softmax_loss(states, items, wanted)
        negatives = torch.randint(len(items), (len(wanted), self.settings.sampled), device=states.device)
        return sampled_softmax_loss(states, items, wanted, negatives)

    @torch.no_grad()
    def lists(self, cases: Cases, *, k: int, exclude_history: bool, batch_size: int = 512) -> np.ndarray:
        """The k best items (n, k) of each case."""
        self.eval()
        lists = np.full((len(cases), k), -1, dtype=np.int64)
        order = np.argsort(cases.rows - cases.starts, kind="stable")
        for begin in range(0, len(cases), batch_size):
            index = order[begin : begin + batch_size]
            history, length = cases.histories(index, self.settings.max_items)
            items, lengths = torch.from_numpy(history).to(self.device), torch.from_numpy(length).to(self.device)
            states = self.encode(items, lengths)[torch.arange(len(items), device=self.device), lengths - 1]
            scores = F.linear(states, self.items.weight)
            if exclude_history:
                taken = torch.from_numpy(cases.taken(index)).to(self.device)
                # Padding repeats the first item of the row, so that it bars nothing more.
                scores.scatter_(1, torch.where(taken >= 0, taken, taken[:, :1]), -torch.inf)
            best = scores.topk(min(k, scores.shape[1]), dim=1)
            lists[index, : best.indices.shape[1]] = (
                best.indices.masked_fill(best.values == -torch.inf, -1).cpu().numpy()
            )
        return lists


def resolved_settings(
    model: SasRecSettings, training: TrainSettings, *, parts: Sequence[Part], exclude_history: bool
) -> dict[str, Any]:
    """What the artefact hangs on beside its inputs, for its manifest."""
    return {
        "model": to_json(model),
        "train": to_json(training),
        "parts": list(parts),
        "exclude_history": exclude_history,
    }


def train_sasrec(
    folder: Path,
    n_items: int,
    train: Sequences,
    validation: Cases | None,
    model_settings: SasRecSettings,
    settings: TrainSettings,
    *,
    parts: Sequence[Part],
    exclude_history: bool,
    made_from: dict[str, str],
) -> SasRec:
    """Train the baseline with the loop of the supervised stage; the artefact goes to `folder`.

    `train` holds the events of `parts`.
    """
    require(not settings.list_weight, "SASRec reads no slate, which list_weight teaches; expected 0")
    work = working_folder(folder)
    resolved = resolved_settings(model_settings, settings, parts=parts, exclude_history=exclude_history)
    with torch.random.fork_rng(devices=[0] if torch.cuda.is_available() else []):
        torch.manual_seed(settings.seed)
        model = SasRec(model_settings, n_items).to(choose_device(settings.device))
        cases = validation_sample(validation, settings)

        def validate() -> dict[str, float]:
            assert cases is not None
            lists = model.lists(cases, k=10, exclude_history=exclude_history)
            return validation_means(lists, cases, ("recall", "ndcg"))

        summary = fit(
            model,
            work,
            make_windows(train, model_settings.max_items),
            settings,
            loss=model.loss,
            validate=None if cases is None else validate,
            fingerprint=fingerprint(resolved, made_from),
            layers=model.layers,
        )
    sizes = {"parameters": sum(p.numel() for p in model.parameters())} | summary
    with write_artifact(
        folder, "sasrec", made_from=made_from, settings=resolved, seed=settings.seed, sizes=sizes
    ) as fresh:
        save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, fresh / WEIGHTS)
        write_events_used(fresh, train.rows)
        keep_records(work, fresh)
    shutil.rmtree(work)
    return model


def read_sasrec(folder: Path, n_items: int) -> SasRec:
    """Read a trained baseline back. Raises: ArtifactError."""
    manifest = read_manifest(folder, "sasrec")
    model = SasRec(from_json(SasRecSettings, manifest.settings["model"]), n_items)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read ({error}); train the baseline again") from error
    return model.eval()

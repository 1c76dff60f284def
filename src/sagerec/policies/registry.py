"""The one place that knows concrete policies: it makes them from settings and reads them by the kind a manifest names.

A policy of one's own is one more `PolicyKind`, given to `register_policy`; nothing else changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sagerec.actions.space import ActionSpace
from sagerec.artifacts import read_manifest
from sagerec.config import check_fields, from_json, to_json
from sagerec.errors import ArtifactError, SettingsError
from sagerec.policies.item_scores import ItemScores, ItemScoresSettings
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings
from sagerec.policies.protocol import AnyPolicy

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """A policy, as the command line offers it: its kind, and of its shape what is not to be the kind's own."""

    kind: Literal["item-scores", "lazy-decoder"] = "item-scores"
    """item-scores: codes by the scores of the items under them; lazy-decoder: codes by a decoder of their own."""
    width: int | None = None
    """Width of every layer (128)."""
    encoder_layers: int | None = None
    """Causal layers over the history's items (item-scores 1, lazy-decoder 2)."""
    decoder_layers: int | None = None
    """Causal layers over the codes of one item (lazy-decoder 1)."""
    heads: int | None = None
    """Attention heads; they divide the width, and each is of even width (item-scores 2, lazy-decoder 4)."""
    expansion: int | None = None
    """Width of the feed-forward layers over that of the others (lazy-decoder 4)."""
    dropout: float | None = None
    """Dropout, rounded to 1/256 (item-scores 0.4, lazy-decoder 0.2)."""
    max_items: int | None = None
    """History items read, the latest ones (50)."""
    content: bool | None = None
    """Add a linear map of the item's content vector to what it is known by (on)."""
    item_embedding: bool | None = None
    """Add an embedding of the item's own (item-scores on, lazy-decoder off)."""
    reads_slate: bool | None = None
    """Read the items of a slate like a history while writing on, else only leave them out (item-scores off)."""
    popularity_tilt: float | None = None
    """How much more rare items count than the log has them: every score is less this times log(1 + the item's training
    events, at most `tilt_events`) (item-scores 1)."""
    tilt_events: int | None = None
    """Training events from which on an item is not rare (item-scores 10)."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.resolved()

    def resolved(self) -> Any:
        """The settings of the kind. Raises: SettingsError for a field that it does not have."""
        kind = KINDS[self.kind]
        known = {field.name for field in fields(kind.settings)}
        given = {f.name: v for f in fields(self) if f.name != "kind" and (v := getattr(self, f.name)) is not None}
        for name in sorted(given.keys() - known):
            raise SettingsError(f"{name} is no setting of the policy {self.kind!r}; leave it out")
        return kind.settings(**given)


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """A kind of policy."""

    name: str
    """As manifests have it."""
    settings: type[Any]
    """The dataclass of its shape."""
    make: Callable[[Any, ActionSpace], AnyPolicy]
    """A fresh policy of such settings over a space, its weights drawn from torch's global generator."""


KINDS: dict[str, PolicyKind] = {
    "item-scores": PolicyKind("item-scores", ItemScoresSettings, ItemScores),
    "lazy-decoder": PolicyKind("lazy-decoder", LazyDecoderSettings, LazyDecoder),
}


def register_policy(kind: PolicyKind) -> None:
    """Make a kind of policy known. Raises: SettingsError for a name that is taken by another."""
    if KINDS.get(kind.name, kind) != kind:
        raise SettingsError(f"a policy of the kind {kind.name!r} exists; choose another name")
    KINDS[kind.name] = kind


def kind_of(settings: Any) -> PolicyKind:
    """The kind that a settings dataclass belongs to. Raises: SettingsError."""
    for kind in KINDS.values():
        if type(settings) is kind.settings:
            return kind
    expected = ", ".join(kind.settings.__name__ for kind in KINDS.values())
    raise SettingsError(f"no policy has settings of type {type(settings).__name__}; expected one of {expected}")


def resolve(settings: Any) -> Any:
    """The settings of a kind that `PolicySettings` stand for; those of a kind are returned as they are."""
    return settings.resolved() if isinstance(settings, PolicySettings) else settings


def describe_policy(settings: Any) -> dict[str, Any]:
    """A policy's settings for a manifest: its kind, and all fields."""
    settings = resolve(settings)
    return {"kind": kind_of(settings).name, **to_json(settings)}


def settings_of(described: dict[str, Any]) -> Any:
    """The settings that `describe_policy` wrote. Raises: SettingsError for an unknown kind or setting."""
    values = dict(described)
    name = values.pop("kind", None)
    if name not in KINDS:
        raise SettingsError(f"a policy of the kind {name!r}; expected one of {', '.join(KINDS)}")
    return from_json(KINDS[name].settings, values)


def make_policy(space: ActionSpace, settings: Any) -> AnyPolicy:
    """A fresh policy over a space, its weights drawn from torch's global generator. Raises: SettingsError."""
    settings = resolve(settings)
    return kind_of(settings).make(settings, space)


def write_weights(folder: Path, policy: AnyPolicy) -> None:
    """Save the weights in `folder`."""
    save_file({name: value.contiguous().cpu() for name, value in policy.state_dict().items()}, folder / WEIGHTS)


def read_policy(folder: Path, space: ActionSpace) -> AnyPolicy:
    """Read a trained policy on the CPU, in evaluation mode; where items were added to the space since, it is grown.

    Raises: ArtifactError where the weights are missing, were trained on another space, or are of an unknown kind.
    """
    manifest = read_manifest(folder, "policy")
    if not {space.content_hash, *space.grown_from} & set(manifest.made_from.values()):
        raise ArtifactError(f"{folder} was trained on other Semantic IDs than those given; train it again")
    try:
        settings = settings_of(manifest.settings["policy"])
    except SettingsError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        policy = make_policy(space, settings)
    try:
        policy.load_weights(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read ({error}); train the policy again") from error
    return policy.eval()

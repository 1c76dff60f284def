"""The one place that knows concrete policies: it makes them from settings and reads them by the kind a manifest names.

A policy of one's own is one more `PolicyKind`, given to `register_policy`; nothing else changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tyro.conf import arg

from sagerec.actions.space import ActionSpace
from sagerec.artifacts import read_manifest
from sagerec.config import check_fields, from_json, to_json
from sagerec.errors import ArtifactError, SettingsError
from sagerec.policies.causal_lm import CausalLM, CausalLMSettings
from sagerec.policies.item_scores import ItemScores, ItemScoresSettings
from sagerec.policies.language import LanguageModel, hash_model, make_language, read_language
from sagerec.policies.lazy_decoder import LazyDecoder, LazyDecoderSettings
from sagerec.policies.protocol import AnyPolicy

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """A policy, as the command line offers it: its kind, and of its shape what is not to be the kind's own."""

    kind: Annotated[Literal["item-scores", "lazy-decoder", "causal-lm"], arg(aliases=["--policy"])] = "item-scores"
    """item-scores: codes by the scores of the items under them; lazy-decoder: codes by a decoder of their own;
    causal-lm: a language model writes codes or titles."""
    model: Annotated[str | None, arg(aliases=["--model"])] = None
    """Folder or hub name of the language model (causal-lm); for titles, the one whose tokenizer wrote them."""
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
    """Dropout, rounded to 1/256 (item-scores 0.4, lazy-decoder 0.2, causal-lm 0: on embeddings and final states)."""
    max_items: int | None = None
    """History items read, the latest ones (50, causal-lm 20)."""
    content: bool | None = None
    """Add a linear map of the item's content vector to what it is known by (on)."""
    item_embedding: bool | None = None
    """Add an embedding of the item's own (item-scores on, lazy-decoder off)."""
    reads_slate: bool | None = None
    """Read the items of a slate like a history while writing on, else only leave them out (item-scores off)."""
    slate_mark: bool | None = None
    """Add a vector of its own to the items of a slate that is read, which `--train.list-weight` teaches (off)."""
    popularity_tilt: float | None = None
    """How much more rare items count than the log has them: every score is less this times log(1 + the item's training
    events, at most `tilt_events`) (item-scores 1)."""
    tilt_events: int | None = None
    """Training events from which on an item is not rare (item-scores 10)."""
    instruction: str | None = None
    """What a language model reads before every history, in its chat template where it has one (none)."""
    max_tokens: int | None = None
    """Tokens of instruction, history and next item together (causal-lm 512); old items are dropped whole."""
    micro_tokens: int | None = None
    """Tokens that a training step of a language model computes at a time (16384)."""
    recompute: bool | None = None
    """Compute each such piece again in the backward pass, for memory (off)."""
    train: Literal["all", "lora", "new-tokens"] | None = None
    """What of a language model is trained: all; lora, adapters that are merged when saved; new-tokens, the rows of
    Semantic IDs (all)."""
    lora_rank: int | None = None
    """Rank of the adapters (16)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of a language model's weights (float32)."""
    title_weight: float | None = None
    """For Semantic IDs in a language model: weight of title -> ID, ID -> title, titles -> next ID (0)."""
    free_weight: float | None = None
    """Weight of a language model's next-token loss over the whole vocabulary beside the one over legal tokens (0)."""
    profile_tokens: int | None = None
    """Tokens of a user's profile (users.parquet) that a language model reads before the history, at most (0: none)."""

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


def _save_weights(folder: Path, policy: AnyPolicy) -> None:
    save_file({name: value.contiguous().cpu() for name, value in policy.state_dict().items()}, folder / WEIGHTS)


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """A kind of policy."""

    name: str
    """As manifests have it."""
    settings: type[Any]
    """The dataclass of its shape."""
    make: Callable[[Any, ActionSpace], AnyPolicy]
    """A fresh policy of such settings over a space, its weights drawn from torch's global generator."""
    read: Callable[[Path, Any, ActionSpace], AnyPolicy] | None = None
    """Reads a trained one of such settings from a folder; None: a fresh one takes the weights."""
    save: Callable[[Path, Any], None] = _save_weights
    """Writes a trained one to a folder."""
    inputs: Callable[[Any, str], dict[str, str]] = lambda settings, model: {}
    """Name -> content hash of what such settings name beside the run; `model` wrote the run's titles."""
    writes_freely: bool = False
    """Whether it writes without the trie too."""


def _causal_lm(settings: CausalLMSettings, space: ActionSpace, language: LanguageModel | None = None) -> CausalLM:
    """A causal-lm policy of its settings' model, or of one that was read."""
    if language is None:
        language = make_language(settings.model, space, instruction=settings.instruction, dtype=settings.dtype)
    return CausalLM(settings, space, language)


def _read_causal_lm(folder: Path, settings: CausalLMSettings, space: ActionSpace) -> CausalLM:
    return _causal_lm(
        settings, space, read_language(folder, space, instruction=settings.instruction, dtype=settings.dtype)
    )


KINDS: dict[str, PolicyKind] = {
    "item-scores": PolicyKind("item-scores", ItemScoresSettings, ItemScores),
    "lazy-decoder": PolicyKind("lazy-decoder", LazyDecoderSettings, LazyDecoder),
    "causal-lm": PolicyKind(
        "causal-lm",
        CausalLMSettings,
        _causal_lm,
        _read_causal_lm,
        lambda folder, policy: policy.language.save(folder),
        lambda settings, model: hash_model(settings.model or model),
        writes_freely=True,
    ),
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


def writes_freely(described: dict[str, Any]) -> bool:
    """Whether a policy that `describe_policy` wrote of has `write_texts`. Raises: SettingsError."""
    return kind_of(settings_of(described)).writes_freely


def make_policy(space: ActionSpace, settings: Any) -> AnyPolicy:
    """A fresh policy over a space, its weights drawn from torch's global generator. Raises: SettingsError."""
    settings = resolve(settings)
    return kind_of(settings).make(settings, space)


def inputs(settings: Any, actions: dict[str, Any]) -> dict[str, str]:
    """Name -> content hash of what a policy is made from beside what the run holds; `actions` are the settings of the
    run's action space.
    """
    settings = resolve(settings)
    return kind_of(settings).inputs(settings, str(actions.get("model", "")))


def write_weights(folder: Path, policy: AnyPolicy) -> None:
    """Save the weights in `folder`."""
    own = [kind.save for kind in KINDS.values() if type(getattr(policy, "settings", None)) is kind.settings]
    (own[0] if own else _save_weights)(folder, policy)


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
    kind = kind_of(settings)
    try:
        if kind.read is not None:
            return kind.read(folder, settings, space).eval()
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
            policy = make_policy(space, settings)
        policy.load_weights(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError, SettingsError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read ({error}); train the policy again") from error
    return policy.eval()

"""Language models as Hugging Face writes them: read, checked, given a vocabulary for the actions, and saved again.

Nothing of a model's generation settings is used or kept: decoding is ours. A folder that is saved is a plain Hugging
Face folder (config, safetensors, tokenizer), which `AutoModelForCausalLM` and inference engines read.

Shapes: B users, S columns read before, Q new ones, V vocabulary, D width.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sagerec.actions.space import ActionSpace
from sagerec.actions.titles import Titles, first_line, load_tokenizer, normalise, whole_characters
from sagerec.artifacts import hash_folder
from sagerec.errors import MissingExtraError, SettingsError

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary scalings that change where a text passes the length that the model was trained on."""
CAPS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings of other output layers than a linear map, maybe softly capped."""
PROFILE = "<profile>"
"""Stands for a user's profile while a chat template is cut at its place."""
ADAPTER = "lora_"
"""In the names of adapters' weights."""


class LanguageModel:
    """A causal language model and the vocabulary of an action space in it."""

    def __init__(self, model: Any, tokenizer: Any, space: ActionSpace, *, instruction: str) -> None:
        self.model: Any = model
        self.tokenizer, self.config = tokenizer, model.config
        self.max_positions = readable_positions(self.config)
        self.backbone: Any = getattr(self.model, self.model.base_model_prefix)
        self.cache_name = _cache_name(self.backbone)
        self.end = space.end if isinstance(space, Titles) else None
        self.new_tokens: list[int] = []
        if isinstance(space, Titles):
            _check_tokenizer(tokenizer, space)
            self.base = torch.zeros(space.longest, dtype=torch.int64)
        else:
            self.base = self._add_codes(space)
        self.prefix = prompt(tokenizer, instruction)

    def _add_codes(self, space: ActionSpace) -> Tensor:
        """Tokens `<a_0>`, `<a_1>`, … of every level, new ones where the tokenizer lacks them; the first of each level.

        A new token begins as the mean of all.
        """
        sizes = (space.padded().amax(dim=0) + 1).tolist()
        names = [f"<{chr(97 + level)}_{code}>" for level, size in enumerate(sizes) for code in range(size)]
        known = self.tokenizer.get_vocab()
        fresh = [name for name in names if name not in known]
        if fresh:
            before = len(self.tokenizer)
            self.tokenizer.add_tokens(fresh)
            rows = self.embedding().weight.shape[0]
            if len(self.tokenizer) > rows:
                self.model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            for weight in self.matrices():
                with torch.no_grad():
                    weight[before : len(self.tokenizer)] = weight[:before].float().mean(dim=0).to(weight.dtype)
        numbers = self.tokenizer.convert_tokens_to_ids(names)
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise SettingsError(
                "the model's vocabulary has some of the Semantic IDs' tokens, at other places; expected all or none: "
                "train from the model that they were added to"
            )
        self.new_tokens = numbers
        sizes_before = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        found: Tensor = sizes_before + numbers[0]
        return found

    def ends(self, text: list[int], base: Tensor) -> bool:
        """Whether a text of vocabulary ids is a whole item: a title that is ended, or a code of every level."""
        return text[-1] == self.end if self.end is not None else len(text) == len(base)

    def reading(self, text: list[int]) -> Any:
        """What texts of vocabulary ids are compared by: how titles read, or the tokens of IDs."""
        if self.end is None:
            return tuple(text)
        return normalise(self.tokenizer.decode(text[:-1] if text[-1] == self.end else text))

    def profiles(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Vocabulary ids of profiles: each one line, of at most `longest` tokens, never cut inside a character.

        Tokens that were added to the vocabulary, such as those that begin a turn or stand for codes, are left out.
        """
        lines = [" ".join(text.encode(errors="replace").decode().split()) for text in texts]
        encoded = self.tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if lines else []
        plain = [[token for token in own if token not in self._added] for own in encoded]
        return [whole_characters(self.tokenizer, own[:longest]) if len(own) > longest else own for own in plain]

    @cached_property
    def _added(self) -> set[int]:
        """Vocabulary ids of tokens that stand for no text of their own."""
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder, *self.new_tokens}

    def embedding(self) -> Any:
        """The module that embeds tokens."""
        return self.model.get_input_embeddings()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weights (V, D) and bias (V,) of the output layer."""
        layer = self.model.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    def matrices(self) -> list[Tensor]:
        """The matrices (V, D) with a row a token: of the embedding and, where it is another, of the output layer."""
        one, other = self.embedding().weight, self.head()[0]
        return [one] if one is other else [one, other]

    def cap(self, logits: Tensor) -> Tensor:
        """Logits as the model caps them."""
        most = getattr(self.config, "final_logit_softcapping", None)
        return logits if most is None else most * torch.tanh(logits / most)

    def forward(
        self, embedded: Tensor, positions: Tensor, seen: Tensor | None, read: tuple[tuple[Tensor, Tensor], ...]
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        """Outputs (B, Q, D) of new tokens (B, Q, D) at positions (B, Q); by layer, keys and values (B, H, S + Q, D/H).

        `seen` (B, 1, Q, S + Q) bool; None is a text from the beginning, each token seeing those before it.
        """
        from transformers import DynamicCache

        cache = DynamicCache(read) if read else DynamicCache()
        if seen is not None and self.config._attn_implementation == "eager":
            hidden = torch.zeros_like(seen, dtype=embedded.dtype)
            seen = hidden.masked_fill(~seen, torch.finfo(embedded.dtype).min)
        given = {self.cache_name: cache, "use_cache": True, "attention_mask": seen, "position_ids": positions}
        output = self.backbone(inputs_embeds=embedded, **given).last_hidden_state
        return output, tuple((layer.keys, layer.values) for layer in cache.layers)

    def begin_with_titles(self, tokens: Sequence[Tensor], titles: Sequence[str]) -> None:
        """Give each new token the mean of what the titles of its items are made of.

        Args: tokens: vocabulary ids (F,) of each item; titles (N,). A token without items keeps what it has.
        """
        if not self.new_tokens:
            return
        first, count = self.new_tokens[0], len(self.new_tokens)
        pieces = self.tokenizer(list(titles), add_special_tokens=False, verbose=False)["input_ids"]
        both = list(zip(tokens, map(torch.tensor, pieces), strict=True))
        code = torch.cat([(own - first).repeat_interleave(len(p)) for own, p in both])
        piece = torch.cat([p.long().repeat(len(own)) for own, p in both])
        uses = torch.bincount(code, minlength=count)
        for weight in self.matrices():
            with torch.no_grad():
                total = torch.zeros(count, weight.shape[1])
                for at in range(0, len(code), 2**18):
                    part = slice(at, at + 2**18)
                    total.index_add_(0, code[part], weight[piece[part].to(weight.device)].float().cpu())
                mean = (total / uses[:, None].clamp(min=1)).to(weight)
                used = (uses > 0).to(weight.device)[:, None]
                rows = slice(first, first + count)
                weight[rows] = torch.where(used, mean, weight[rows])

    def choose_trained(self, what: str, lora_rank: int) -> None:
        """Freeze all but what is trained: all; adapters and new tokens (lora); or these alone (new-tokens)."""
        if what == "all":
            return
        if what == "new-tokens" and not self.new_tokens:
            raise SettingsError("titles add no tokens, so that new-tokens would train nothing; expected all or lora")
        self.model.requires_grad_(False)
        if what == "lora":
            self.model = _with_adapters(self.model, lora_rank)
        if self.new_tokens:
            for weight in self.matrices():
                weight.requires_grad_(True)
                rows = slice(self.new_tokens[0], self.new_tokens[-1] + 1)
                weight.register_hook(partial(only_rows, rows))  # type: ignore[no-untyped-call]
                weight.no_decay = True  # type: ignore[attr-defined]

    def plain(self) -> Any:
        """The model without what adapters wrap it in."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def merged(self) -> dict[str, Tensor]:
        """The weights without adapters, each of which is added in float32 to what it adapts and rounded once."""
        plain = self.plain()
        weights = {n.replace("base_layer.", ""): w for n, w in plain.state_dict().items() if ADAPTER not in n}
        for name, layer in plain.named_modules():
            if hasattr(layer, "base_layer"):
                (adapter,) = layer.active_adapters
                own = weights[f"{name}.weight"]
                whole = own.float() + layer.get_delta_weight(adapter).float()
                weights[f"{name}.weight"] = whole.to(own.dtype)
        return weights

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder, adapters merged, generation settings left out."""
        from transformers import GenerationConfig

        plain, weights = self.plain(), self.merged()
        plain.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id, eos_token_id=self.tokenizer.eos_token_id
        )
        with quiet():
            plain.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    @staticmethod
    def tie(policy: nn.Module) -> None:
        """Make the weights of a policy hold each tensor once: a tied one is left out, and filled in on reading."""
        names: dict[int, str] = {}
        tied: dict[str, str] = {}
        for name, value in policy.state_dict(keep_vars=True).items():
            first = names.setdefault(id(value), name)
            if first != name:
                tied[name] = first

        def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            for name in tied:
                state.pop(prefix + name, None)

        def fill_in(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            for name, first in tied.items():
                if prefix + first in state:
                    state.setdefault(prefix + name, state[prefix + first])

        policy.register_state_dict_post_hook(leave_out)  # type: ignore[no-untyped-call]
        policy.register_load_state_dict_pre_hook(fill_in)  # type: ignore[no-untyped-call]


def only_rows(rows: slice, gradient: Tensor) -> Tensor:
    """The gradient of some rows of a matrix, 0 elsewhere."""
    kept = torch.zeros_like(gradient)
    kept[rows] = gradient[rows]
    return kept


def readable_positions(config: Any) -> int:
    """Positions that a model reads as trees: within its attention windows and the length it was trained on.

    Raises: SettingsError for an output layer that is not a linear map.
    """
    for name in CAPS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise SettingsError(f"the model scales its logits ({name}), which is not supported; choose another")
    most = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0) or 10**6)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window and slides:
        most = min(most, int(window))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type", part.get("type")) in LENGTH_DEPENDENT:
            original = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            most = min(most, int(original or most))
    return most


def prompt(tokenizer: Any, instruction: str) -> Tensor:
    """(P,) tokens before every history: the instruction, as a user's turn where there is a chat template."""
    if instruction and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": instruction}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        found = tokenizer(f"{instruction}\n" if instruction else "", add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is not None:
            found = [tokenizer.bos_token_id, *found]
    return torch.tensor(found, dtype=torch.int64)


def prompt_of_user(tokenizer: Any, instruction: str) -> tuple[Tensor, list[int]]:
    """The tokens before a user's profile and those between it and the history: of the user's turn where there is a chat
    template and an instruction, else the instruction, and a line end.

    Raises: SettingsError where a chat template does not repeat what it is given.
    """
    before, after = f"{instruction}\n" if instruction else "", "\n"
    templated = bool(instruction and getattr(tokenizer, "chat_template", None))
    if templated:
        mark = PROFILE
        while mark in instruction:
            mark = f"<{mark}>"
        turns = [{"role": "user", "content": f"{instruction}\n{mark}"}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if text.count(mark) != 1:
            raise SettingsError(
                "the model's chat template does not say once what it is given, so that it has no place for a profile; "
                "expected no instruction, or another model"
            )
        before, after = text.split(mark)
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    if not templated and tokenizer.bos_token_id is not None:
        head = [tokenizer.bos_token_id, *head]
    return torch.tensor(head, dtype=torch.int64), tail


@contextmanager
def quiet() -> Iterator[None]:
    """No bars nor warnings of the library's own: of a model's load it has one for every shard."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def load_model(model: str, *, dtype: str) -> Any:
    """A causal language model in evaluation mode. Raises: MissingExtraError; SettingsError."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError('language models need transformers: pip install "sagerec[lm]"') from error
    given: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": Path(model).is_dir()}
    try:
        with quiet():
            loaded, found = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **given)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SettingsError(
            f"model is {model!r}, which cannot be read ({first_line(error)}); expected a folder with a Hugging Face "
            "causal language model (sagerec lm new makes one), or the name of one where the hub is at hand"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise SettingsError(
            f"model is {model!r}, whose files lack {len(missing)} of its weights, such as {missing[0]}; get it again"
        )
    if getattr(loaded.config, "attn_logit_softcapping", None):
        loaded.set_attn_implementation("eager")  # the only one that caps attention
    return loaded.eval()


def make_language(model: str, space: ActionSpace, *, instruction: str, dtype: str) -> LanguageModel:
    """A language model with the vocabulary of a space, checked. Raises: SettingsError; MissingExtraError."""
    name = model or (space.model if isinstance(space, Titles) else "")
    if not name:
        raise SettingsError("a causal-lm policy needs --model: a folder (sagerec lm new makes one) or a hub name")
    tokenizer = load_tokenizer(name)
    made = LanguageModel(load_model(name, dtype=dtype), tokenizer, space, instruction=instruction)
    check_trees(made, name)
    return made


def read_language(folder: Path, space: ActionSpace, *, instruction: str, dtype: str) -> LanguageModel:
    """A language model that `save` wrote. Raises: SettingsError; MissingExtraError."""
    return LanguageModel(
        load_model(str(folder), dtype=dtype), load_tokenizer(str(folder)), space, instruction=instruction
    )


def hash_model(model: str) -> dict[str, str]:
    """Content hash of the model's files, for `made_from`; a hub name stands for itself, no model for nothing."""
    if not model:
        return {}
    folder = Path(model)
    return {"model": hash_folder(folder) if folder.is_dir() else f"hub:{model}"}


@torch.no_grad()
def check_trees(language: LanguageModel, name: str) -> None:
    """Read two continuations of a text side by side and one by one. Raises: SettingsError where they differ."""
    device, rows = language.embedding().weight.device, language.embedding().weight.shape[0]
    start, one, other = (torch.arange(n, n + 3, device=device)[None] % rows for n in (1, 5, 11))
    places = torch.arange(6, device=device)[None]
    embed = language.embedding()
    try:
        _, read = language.forward(embed(start), places[:, :3], None, ())
        sees = torch.zeros(1, 1, 6, 9, dtype=torch.bool, device=device)
        sees[..., :3] = True
        for at in range(6):
            sees[0, 0, at, 3 + at // 3 * 3 : 4 + at] = True
        both, _ = language.forward(embed(torch.cat([one, other], dim=1)), places[:, 3:].repeat(1, 2), sees, read)
        alone = [
            language.forward(embed(torch.cat([start, x], dim=1)), places, None, ())[0][:, 3:] for x in (one, other)
        ]
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise SettingsError(
            f"{name}: this layout cannot be read as trees ({first_line(error)}); choose another model"
        ) from error
    expected = torch.cat(alone, dim=1).float()
    off = float((both.float() - expected).norm() / expected.norm().clamp(min=1e-6))
    if not off < (1e-3 if both.dtype == torch.float32 else 5e-2):
        raise SettingsError(
            f"{name}: two continuations read side by side differ from each alone by {off:.2g} of their size: positions "
            "or attention of this layout hang on more than is given; choose another model"
        )


def _cache_name(backbone: Any) -> str:
    """What the layout calls what was read. Raises: SettingsError where it takes no positions."""
    known = inspect.signature(backbone.forward).parameters
    if "position_ids" not in known:
        raise SettingsError(
            f"{type(backbone).__name__} takes no positions, so it cannot be read as trees; choose another"
        )
    return "cache" if "cache" in known else "past_key_values"


def _check_tokenizer(tokenizer: Any, space: Titles) -> None:
    """Raises: SettingsError where the titles were written by another tokenizer than the model's."""
    wrote = load_tokenizer(str(space.tokenizer))
    if wrote.get_vocab() != tokenizer.get_vocab():
        raise SettingsError(
            f"the titles were written by the tokenizer of {space.model!r}, which is not this model's; make them again "
            "with: sagerec ids RUN --actions text --model MODEL"
        )


def _with_adapters(model: Any, rank: int) -> Any:
    """The model with adapters on every linear layer but the output layer. Raises: MissingExtraError."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError('LoRA needs peft: pip install "sagerec[lm]"') from error
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same adapters whenever a policy is made or read: they begin with no effect
        return get_peft_model(model, settings)

"""A Hugging Face causal language model as a policy: items are written as titles, or as Semantic IDs in its vocabulary.

The model reads an instruction, who the user is where it is told, and then the history, one item after another as its
own tokens, and what comes next is the next item: a history, a slate and a training sequence are one kind of text.
Logits are computed only after prefixes where the trie leaves a choice and only for the legal tokens, over which they
are normalised; never a row of the whole vocabulary. Old history is dropped item by item where it does not fit.

What is read is a state: keys and values of a user's columns, and which of them each state sees (`packing`). A context
is read once for its beams and slates, in writing and in the loss; slates that begin alike share what they begin with.
What cannot be read so is refused by name: attention windows and rotary scalings that hang on the length, positions that
cannot be given.

Shapes: B users, G slates of each, K places, R states, S columns, M tokens, V vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagerec.actions.space import ActionSpace
from sagerec.actions.trie import ROOT, Children
from sagerec.catalogue.profiles import as_words, is_word, token_of
from sagerec.config import added, at_least, between, check_fields, full_path
from sagerec.errors import SettingsError
from sagerec.policies.free_writing import Readings, sample_freely, score_freely, search_freely
from sagerec.policies.language import LanguageModel, prompt_of_user
from sagerec.policies.language_tasks import tasks_loss
from sagerec.policies.layers import FastDropout
from sagerec.policies.packing import Rows, Tree, chains, lay_out, mask, share_rows, slate_tree, table, ways
from sagerec.policies.protocol import Policy
from sagerec.policies.vocabulary import choices_loss, root_logits, token_logits, token_logprobs

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Per layer, keys and values (B, H, S, D/H)."""


@dataclass(frozen=True, slots=True)
class CausalLMSettings:
    """Which language model, and how it reads."""

    model: str = ""
    """Folder or hub name of the model; for titles, where not given, the one whose tokenizer wrote them."""
    instruction: str = ""
    """What it reads before every history, in the tokenizer's chat template where it has one."""
    max_items: int = 20
    """History items read, the latest ones."""
    max_tokens: int = 512
    """Tokens of instruction, profile, history and next item together, at most: old items are dropped whole."""
    dropout: float = 0.0
    """Dropout on token embeddings and final states, rounded to 1/256, beside what the model has of its own."""
    micro_tokens: int = 16384
    """Tokens, padding included, that a training step computes at a time."""
    recompute: bool = False
    """Compute each such piece again in the backward pass: memory for one piece, for a third more work."""
    train: Literal["all", "lora", "new-tokens"] = "all"
    """What is trained: all; lora, adapters that are merged when saved; new-tokens, the rows of Semantic IDs."""
    lora_rank: int = 16
    """Rank of the adapters."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    title_weight: float = 0.0
    """For Semantic IDs: weight of what ties codes to words (`language_tasks`), in nats an ID or title."""
    free_weight: float = 0.0
    """Weight of a next-token loss over the whole vocabulary beside the one over legal tokens, in nats an item: without
    it the model knows nothing of what is no item, and cannot write without the trie."""
    profile_tokens: int = added(0)
    """Tokens of a user's profile (`users.parquet`) that it reads between instruction and history, at most; 0: none."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            max_items=at_least(1, 10_000),
            max_tokens=at_least(8, 10**6),
            dropout=between(0, 1, below=True),
            micro_tokens=at_least(64),
            lora_rank=at_least(1, 4096),
            free_weight=at_least(0),
            title_weight=at_least(0),
            profile_tokens=between(0, 10_000),
        )
        object.__setattr__(self, "model", full_path(self.model))


class States(NamedTuple):
    """R places in the text of B users, at which something may be written. A context is one, and so is a prefix."""

    read: KeyValues
    """What was read of each user, S columns."""
    user: Tensor
    """(R,) int64 whose it is; ascending."""
    seen: Tensor
    """(R, S) bool: the columns that the next token sees."""
    position: Tensor
    """(R,) int64 position of the next token."""
    hidden: Tensor
    """(R, D) the model's output at the last token."""
    level: int
    """Tokens of the present item written so far."""

    @property
    def n_users(self) -> int:
        return int(self.read[0][0].shape[0])

    def users(self, some: Tensor) -> "States":
        """Those users (b,), where each has one state."""
        return self.of(some)._replace(
            read=tuple((key[some], value[some]) for key, value in self.read),
            user=torch.arange(len(some), device=some.device),
        )

    def of(self, rows: Tensor) -> "States":
        """Those rows (R',)."""
        return self._replace(
            user=self.user[rows], seen=self.seen[rows], position=self.position[rows], hidden=self.hidden[rows]
        )


class CausalLM(Policy[States, States]):
    """The policy. Calls: see `sagerec.policies.protocol.Policy`."""

    base: Tensor
    prefix: Tensor
    before_profile: Tensor
    root_tokens: Tensor

    def __init__(self, settings: CausalLMSettings, space: ActionSpace, language: LanguageModel) -> None:
        super().__init__()
        self.settings, self.space, self.max_items = settings, space, settings.max_items
        if settings.title_weight and not language.new_tokens:
            raise SettingsError("title_weight ties codes to words, and titles are words; expected 0 for them")
        language.choose_trained(settings.train, settings.lora_rank)
        self.language, self.lm = language, language.model
        self.dropout = FastDropout(settings.dropout)
        self.register_buffer("base", language.base, persistent=False)
        self.register_buffer("prefix", language.prefix, persistent=False)
        root = space.trie.children(torch.full((1,), ROOT, device=space.device)).token
        self.register_buffer("root_tokens", root + language.base[0], persistent=False)
        self.longest_prompt = len(self.prefix)
        if settings.profile_tokens:
            head, self.after_profile = prompt_of_user(language.tokenizer, settings.instruction)
            self.register_buffer("before_profile", head, persistent=False)
            of_user = len(head) + settings.profile_tokens + len(self.after_profile)
            self.longest_prompt = max(self.longest_prompt, of_user)
        self.budget = min(settings.max_tokens, language.max_positions) - self.longest_prompt - space.longest
        if self.budget < space.longest:
            raise SettingsError(
                f"max_tokens is {settings.max_tokens}, and the model reads {language.max_positions}; expected at least "
                f"{self.longest_prompt + 2 * space.longest}: the instruction, a profile and two of the longest items"
            )
        language.tie(self)
        self.title_tokens: list[list[int]] = []
        self._written: list[list[int]] = []

    @property
    def most_users(self) -> int:
        """Users that are read at a time."""
        return max(
            1,
            self.settings.micro_tokens // (self.longest_prompt + min(self.budget, self.max_items * self.space.longest)),
        )

    @property
    def reads_profiles(self) -> bool:
        """Whether it reads who its users are; see the protocol."""
        return self.settings.profile_tokens > 0

    def profile_words(self, profiles: Sequence[str]) -> list[list[int]]:
        """What it reads of profiles; see the protocol."""
        if not self.reads_profiles:
            return super().profile_words(profiles)
        found = self.language.profiles(profiles, self.settings.profile_tokens)
        return [as_words([*own, *self.after_profile]) if own else [] for own in found]

    def blocks(self) -> list[nn.Module]:
        """The model's layers; none where a part is trained, whose gradients are held back in whole tensors."""
        kinds = getattr(self.lm, "_no_split_modules", None) or ()
        return [m for m in self.lm.modules() if type(m).__name__ in kinds] if self.settings.train == "all" else []

    def describe(self, titles: Sequence[str]) -> None:
        """Begin the tokens of Semantic IDs with what the titles of their items are made of; learn these beside them."""
        if self.settings.title_weight:
            self.title_tokens = self.language.tokenizer(list(titles), add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        if self.language.new_tokens:
            self.language.begin_with_titles([torch.tensor(own) for own in self.item_tokens()], titles)

    # What is read

    def _tokens(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Vocabulary ids (F,) of items (n,), one after another, and how many each has (n,)."""
        paths = self.space.paths(items)
        token = self.space.trie.token[paths.node].long() + self.base[paths.depth]
        return token, torch.bincount(paths.owner, minlength=len(items))

    def _read(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """The same of items and words (n,)."""
        if not self.reads_profiles:
            return self._tokens(entries)
        says = is_word(entries)
        token, count = self._tokens(entries[~says])
        whole = torch.ones_like(entries)
        whole[~says] = count
        said = says.repeat_interleave(whole)
        found = torch.empty_like(said, dtype=token.dtype)
        found[said], found[~said] = token_of(entries[says]), token
        return found, whole

    def _text(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Instruction and histories (B, T) with lengths (B,) as tokens (M,) user by user; each one's user (M,), and
        place (M,) in the history, -1 in instruction and profile. The oldest items that do not fit are left out.
        """
        device = items.device
        there = torch.arange(items.shape[1], device=device) < lengths[:, None]
        there &= self._fits(items, there)
        user, place = there.nonzero(as_tuple=True)
        entries = items[user, place]
        token, count = self._read(entries)
        place = place.masked_fill(is_word(entries), -1)
        owner, begun = self._beginnings(items, there)
        users = torch.cat([owner, user.repeat_interleave(count)])
        order = users.argsort(stable=True)
        places = torch.cat([torch.full_like(owner, -1), place.repeat_interleave(count)])
        return torch.cat([begun, token])[order], users[order], places[order]

    def _beginnings(self, items: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """What histories (B, T) begin with: each token's user (M,), and it (M,)."""
        every = torch.arange(len(items), device=items.device)
        if not self.reads_profiles:
            return every.repeat_interleave(len(self.prefix)), self.prefix.repeat(len(items))
        known = is_word(items[:, :1]).any(dim=1) & there[:, :1].any(dim=1)
        parts = [(every[~known], self.prefix), (every[known], self.before_profile)]
        return (
            torch.cat([users.repeat_interleave(len(given)) for users, given in parts]),
            torch.cat([given.repeat(len(users)) for users, given in parts]),
        )

    def _fits(self, items: Tensor, there: Tensor) -> Tensor:
        """(B, T) bool: the places from which on the items (B, T) that are there fit; words do."""
        return (self._sizes(items, there).flip(1).cumsum(1).flip(1) <= self.budget) | is_word(items)

    def _sizes(self, items: Tensor, there: Tensor) -> Tensor:
        """(B, T) tokens of the items (B, T) that are there; of words none."""
        return torch.where(there & (items >= 0), self.space.lengths(items.clamp(min=0)), 0)

    def forward(
        self, rows: Rows, tokens: Tensor, position: Tensor, seen: Tensor | None, read: KeyValues
    ) -> tuple[Tensor, KeyValues]:
        """Outputs (M, D) of tokens (M,) at positions (M,), and all that was read; `seen` as of the language model."""
        embedded = self.dropout(self.language.embedding()(table(tokens, rows)))
        hidden, read = self.language.forward(embedded, table(position, rows), seen, read)
        return self.dropout(hidden[rows.user, rows.slot]), read

    def read_tree(self, states: States, tree: Tree) -> tuple[Tensor, KeyValues, Tensor]:
        """Read a tree after states: outputs (M, D), all that was read, and what each token sees (M, S + Q)."""
        rows = lay_out(states.user[tree.anchor], states.n_users)
        own, before = ways(tree, rows), states.seen[tree.anchor]
        position = states.position[tree.anchor] + tree.depth
        if len(position) and int(position.max()) >= self.language.max_positions:
            raise SettingsError(
                f"history and slate have {int(position.max()) + 1} tokens, and the model reads "
                f"{self.language.max_positions}; expected a lower max_tokens or k"
            )
        hidden, read = self(rows, tree.token, position, mask(before, own, rows), states.read)
        return hidden, read, torch.cat([before, own], dim=1)

    def encode(self, items: Tensor, lengths: Tensor, *, slates: int = 1) -> States:
        """Read histories; see the protocol."""
        token, user, _ = self._text(items, lengths)
        rows = lay_out(user, len(items))
        hidden, read = self(rows, token, rows.slot, None, ())
        count = torch.bincount(user, minlength=len(items))
        every = torch.arange(len(items), device=items.device)
        seen = torch.arange(rows.width, device=items.device) < count[:, None]
        states = States(read, every, seen, count, hidden[count.cumsum(0) - 1], 0)
        return states if slates == 1 else states.of(every.repeat_interleave(slates))

    def _grown(self, states: States, tree: Tree, last: Tensor, level: int) -> States:
        """The states after tokens `last` (R',) of a tree."""
        hidden, read, seen = self.read_tree(states, tree)
        anchor = tree.anchor[last]
        position = states.position[anchor] + tree.depth[last] + 1
        return States(read, states.user[anchor], seen[last], position, hidden[last], level)

    def append(self, context: States, items: Tensor) -> States:
        """Write an item to each slate; see the protocol."""
        token, count = self._tokens(items.flatten())
        tree = chains(token, torch.arange(items.numel(), device=items.device), count)
        return self._grown(context, tree, count.cumsum(0) - 1, 0)

    def begin(self, context: States) -> States:
        """The empty prefix of every state; see the protocol."""
        return context

    def step(self, prefix: States, rows: Tensor, tokens: Tensor) -> States:
        """Longer prefixes; see the protocol."""
        return self.read_tokens(prefix, rows, tokens + self.base[prefix.level])

    def extend(self, context: States, slates: Tensor) -> States:
        """Read whole slates; see the protocol."""
        whole = torch.cat([slates, slates[:, :, :1]], dim=2)  # of the last item nothing is read
        tree, at, _ = slate_tree(self.space, self.base, whole, whole.new_zeros(whole.numel()))
        hidden, read, seen = self.read_tree(context, tree)
        user = torch.arange(len(slates), device=slates.device).repeat_interleave(len(at) // len(slates))
        old = context.of(user)
        first = at < 0
        old_seen = F.pad(old.seen, (0, seen.shape[1] - old.seen.shape[1]))
        return States(
            read,
            user,
            torch.where(first[:, None], old_seen, seen[at]),
            torch.where(first, old.position, old.position + tree.depth[at] + 1),
            torch.where(first[:, None], old.hidden, hidden[at]),
            0,
        )

    def follow(self, prefix: States, rows: Tensor, tokens: Tensor, lengths: Tensor) -> list[States]:
        """Read token sequences; see the protocol."""
        if not len(tokens):
            return []
        tree = chains(tokens, rows, lengths)
        hidden, _, _ = self.read_tree(prefix, tree._replace(token=tokens + self.base[tree.depth]))
        return self._by_level(prefix, hidden, lengths)

    @staticmethod
    def _by_level(states: States, hidden: Tensor, lengths: Tensor) -> list[States]:
        """Prefixes of 1, 2, … tokens, of outputs (F,) item after item; they can only be asked for logits."""
        begin, found = lengths.cumsum(0) - lengths, []
        for level in range(1, int(lengths.max()) + 1 if len(lengths) else 1):
            longer = (lengths >= level).nonzero()[:, 0]
            found.append(states._replace(hidden=hidden[begin[longer] + level - 1], level=level))
        return found

    def read_slates(
        self, items: Tensor, lengths: Tensor, slates: Tensor, reach: Tensor, *, context: States | None = None
    ) -> tuple[States, list[States]]:
        """Read slates after their histories at once; see the protocol."""
        users = torch.arange(len(items), device=items.device)
        reach = reach.view(slates.shape)
        sizes = self.space.lengths(slates).flatten(1).sum(dim=1)
        size = max(1, self.settings.micro_tokens // (int(sizes.max()) + self.longest_prompt + self.budget))
        starts, prefixes = [], []
        for own in torch.split(users, size):

            def compute(items: Tensor, lengths: Tensor, slates: Tensor, reach: Tensor, own: Tensor = own) -> Any:
                states = self.encode(items, lengths) if context is None else context.users(own)
                k = slates.shape[2]
                if k == 1:  # one token less than an item, and many that slates share
                    tree, _, wanted = slate_tree(self.space, self.base, slates, reach.flatten())
                    hidden = self.read_tree(states, tree)[0] if len(tree.token) else states.hidden
                    return states.hidden, hidden[wanted]
                # Longer slates share little but the context: rows of a few, each beside a copy of what was read.
                row, n_rows = share_rows(self.space.lengths(slates), states.seen.shape[1])
                rows = states.users(torch.arange(len(items), device=items.device).repeat_interleave(n_rows))
                tree, at, wanted = slate_tree(self.space, self.base, slates.flatten(0, 1)[:, None], reach.flatten())
                tree = tree._replace(anchor=row[tree.anchor])
                hidden, _, _ = self.read_tree(rows, tree)
                later = hidden[at.view(-1, k)[:, 1:]].view(len(items), -1, hidden.shape[1])
                return torch.cat([states.hidden[:, None], later], dim=1).flatten(0, 1), hidden[wanted]

            start, found = self._piecewise(compute, items[own], lengths[own], slates[own], reach[own])
            starts.append(start)
            prefixes.append(found)
        # What was read of the pieces is not kept: these can only be asked for logits.
        begun = States((), users, users[:, None] >= 0, users, torch.cat(starts), 0)
        return begun, self._by_level(begun, torch.cat(prefixes), reach.flatten())

    def _piecewise(self, compute: Callable[..., Any], *given: Tensor) -> Any:
        """A piece's result, computed again in the backward pass where the settings say so."""
        if self.settings.recompute and torch.is_grad_enabled():
            return checkpoint(compute, *given, use_reentrant=False)
        return compute(*given)

    # Logits

    def of_users(self, context: States, users: Tensor) -> States:
        """The part of some users; see the protocol."""
        return context.users(users)

    def root_logits(self, prefix: States) -> Tensor:
        """Logits of the root's children; see the protocol."""
        return root_logits(self, prefix.hidden)

    def child_logits(self, prefix: States, children: Children) -> Tensor:
        """Logits of legal continuations; see the protocol."""
        if prefix.level == 0 and len(children.node) == len(prefix.hidden) * len(self.root_tokens):
            return self.root_logits(prefix).flatten()
        return token_logits(self.language, prefix.hidden, children.parent, children.token + self.base[prefix.level])

    def write_freely(self, items: Tensor, lengths: Tensor, *, k: int, beams: int, nearest: bool = False) -> Tensor:
        """Beam search over the whole vocabulary; see the protocol and `free_writing`."""
        texts = search_freely(self, items, lengths, k=k, beams=beams)
        found = [[self.readings.item_of(text, nearest=nearest) for text in own] for own in texts]
        return torch.tensor([own + [-1] * (k - len(own)) for own in found], device=items.device)

    def sample_texts(
        self, items: Tensor, lengths: Tensor, uniforms: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Draw texts from the whole vocabulary; see the protocol and `free_writing`."""
        texts = sample_freely(self, items, lengths, uniforms, temperature=temperature)
        found = [self.readings.item_of(own[own >= 0].tolist(), nearest=False) for own in texts.flatten(0, 1).cpu()]
        return texts, torch.tensor(found, device=items.device).view(texts.shape[:2])

    def text_logprobs(
        self, items: Tensor, lengths: Tensor, texts: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of texts; see the protocol and `free_writing`."""
        width = texts.shape[1] * texts.shape[2] + self.longest_prompt + self.budget
        size = max(1, self.settings.micro_tokens // width)
        pieces = zip(torch.split(items, size), torch.split(lengths, size), torch.split(texts, size), strict=True)
        found = [self._piecewise(partial(score_freely, self, temperature=temperature), *own) for own in pieces]
        return torch.cat([logprobs for logprobs, _ in found]), torch.cat([entropy for _, entropy in found]).mean()

    @property
    def writes_freely(self) -> bool:
        """Whether it can write without the trie; see the protocol."""
        return True

    def write_texts(self, items: Tensor, lengths: Tensor, *, k: int, beams: int) -> list[list[tuple[int, str]]]:
        """The same as texts; see the protocol."""
        texts = search_freely(self, items, lengths, k=k, beams=beams)
        known, read = self.readings.item_of, self.language.tokenizer.decode
        return [[(known(text, nearest=False), read(text).strip()) for text in own] for own in texts]

    @cached_property
    def readings(self) -> Readings:
        """What the items read like."""
        return Readings(self)

    def read_tokens(self, states: States, rows: Tensor, tokens: Tensor) -> States:
        """States of rows (R',), each after one more token (R',) of the vocabulary."""
        tree = chains(tokens, rows, torch.ones_like(rows))
        return self._grown(states, tree, torch.arange(len(rows), device=rows.device), states.level + 1)

    def item_tokens(self) -> list[list[int]]:
        """Vocabulary ids of every item."""
        if not self._written:
            token, count = self._tokens(torch.arange(self.space.n_items, device=self.space.device))
            self._written = [own.tolist() for own in torch.split(token.cpu(), count.tolist())]
        return self._written

    # Training

    def next_item_loss(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Mean negative log-probability of targets; see the protocol. The target of a place must be the item after it,
        for a row is one text; places whose items do not fit do not count.
        """
        follows = counted[:, :-1] & (counted[:, 1:].flip(1).cumsum(1).flip(1) > 0)
        assert bool((targets[:, :-1] == items[:, 1:])[follows].all()), "a row of training is one text"
        whole, ends, there = self._texts(items, targets, counted)
        rows = (ends > 0).nonzero()[:, 0]
        width = self._sizes(whole, there).sum(dim=1)
        total, n_targets = torch.zeros((), device=items.device), 0
        for own in self._pieces(rows, width[rows] + self.longest_prompt):
            loss, n = self._piecewise(self._text_loss, whole[own], ends[own] + 1, counted[own])
            total, n_targets = total + loss, n_targets + n
        loss = total / max(n_targets, 1)
        if self.training and self.title_tokens:
            loss = loss + self.settings.title_weight * tasks_loss(self, items, targets, counted)
        return loss

    def n_targets(self, items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Places whose item fits after another; see the protocol."""
        whole, _, there = self._texts(items, targets, counted)
        fits = self._fits(whole, there)
        return (counted & fits[:, 1:] & fits[:, :-1]).sum().float()

    @staticmethod
    def _texts(items: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of training with their last target (B, T + 1), its place (B,), and which places stand (B, T + 1)."""
        places = torch.arange(items.shape[1] + 1, device=items.device)
        ends = (counted * places[1:]).amax(dim=1)
        last = targets.gather(1, (ends - 1).clamp(min=0)[:, None])
        return F.pad(items, (0, 1)).scatter(1, ends[:, None], last), ends, places <= ends[:, None]

    def outputs(self, token: Tensor, rows: Rows) -> Tensor:
        """Outputs (M, D) of texts of tokens (M,), each text a row, read from the beginning."""
        hidden: Tensor = self(rows, token, rows.slot, None, ())[0]
        return hidden

    def _pieces(self, rows: Tensor, widths: Tensor) -> list[Tensor]:
        """Rows (n,) that are `widths` (n,) tokens wide, in pieces of like width that `micro_tokens` bear."""
        order, pieces, at = widths.argsort(stable=True, descending=True), [], 0
        while at < len(order):
            size = max(1, self.settings.micro_tokens // int(widths[order[at]]))
            pieces.append(rows[order[at : at + size]])
            at += size
        return pieces

    def _text_loss(self, items: Tensor, lengths: Tensor, counted: Tensor) -> tuple[Tensor, int]:
        """Sum of -log P over counted targets of texts (B, T + 1), and their number; place t has the target t + 1."""
        token, user, place = self._text(items, lengths)
        hidden = self.outputs(token, lay_out(user, len(items)))
        # Of each text the oldest item that fits is context alone.
        oldest = torch.full((len(items),), items.shape[1], device=items.device)
        oldest = oldest.scatter_reduce(0, user, place.masked_fill(place < 0, items.shape[1]), "amin")
        wanted = (place > oldest[user]) & counted[user, (place - 1).clamp(min=0)]
        owner = torch.unique_consecutive(torch.stack([user[wanted], place[wanted]]), dim=1)
        paths = self.space.paths(items[owner[0], owner[1]])
        outputs = hidden[wanted.nonzero()[:, 0] - 1]
        loss = choices_loss(self, outputs, paths)
        if self.settings.free_weight:
            loss = loss - self.settings.free_weight * token_logprobs(self.language, outputs, token[wanted]).sum()
        return loss, owner.shape[1]

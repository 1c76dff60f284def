"""What ties the codes of Semantic IDs to words: title -> ID, ID -> title, and the titles of a history -> the next ID.

After LC-Rec (arXiv 2311.09049). Each is a text of its own beside the next-item loss; IDs are normalised over the legal
codes, titles over the vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sagerec.errors import SettingsError
from sagerec.policies.packing import lay_out
from sagerec.policies.vocabulary import choices_loss, token_logprobs

if TYPE_CHECKING:
    from sagerec.policies.causal_lm import CausalLM

TO_ID, TO_TITLE, AFTER = "ID of:\n", "Title of:\n", "After:\n"
"""The line before a title whose ID follows, an ID whose title follows, and titles after which an ID follows."""
MOST = 64
"""Texts of each kind for a batch."""
RECENT, LONGEST = 5, 32
"""Titles of a history, the latest ones; tokens of a title, the first ones."""


def tasks_loss(policy: "CausalLM", items: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean negative log-probability in nats of an ID or title, over the three kinds, of a batch of training rows.

    Args: items, targets (B, T), counted (B, T) bool as in `next_item_loss`; its first rows are taken.
    """
    tokenizer, ids = policy.language.tokenizer, policy.item_tokens()
    ask = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in (TO_ID, TO_TITLE, AFTER)}
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    titles = [own[:LONGEST] for own in policy.title_tokens]
    given: list[list[int]] = []
    said: list[list[int]] = []
    named: list[int] = []  # the item whose ID is said, -1 where it is a title
    for item in targets[counted][:MOST].tolist():
        given += [[*ask[TO_ID], *titles[item], *line], [*ask[TO_TITLE], *ids[item], *line]]
        said += [ids[item], [*titles[item], *line]]
        named += [item, -1]
    for row in range(min(len(items), MOST)):
        places = counted[row].nonzero()[:, 0]
        if len(places):
            last = int(places[-1])
            words = [[*titles[i], *line] for i in items[row, max(0, last + 1 - RECENT) : last + 1].tolist() if i >= 0]
            given.append([*ask[AFTER], *(token for title in words for token in title)])
            said.append(ids[int(targets[row, last])])
            named.append(int(targets[row, last]))
    head = policy.prefix.tolist()
    texts = [[*head, *before, *after] for before, after in zip(given, said, strict=True)]
    if max(map(len, texts)) > policy.language.max_positions:
        raise SettingsError(
            f"title_weight makes texts of {max(map(len, texts))} tokens, and the model reads "
            f"{policy.language.max_positions}; expected 0 for this model"
        )
    token = torch.tensor([t for text in texts for t in text], device=items.device)
    user = torch.repeat_interleave(torch.tensor([len(text) for text in texts], device=items.device))
    wanted = [[False] * (len(text) - len(after)) + [True] * len(after) for text, after in zip(texts, said, strict=True)]
    at = torch.tensor([w for own in wanted for w in own], device=items.device).nonzero()[:, 0]
    owner = torch.tensor(named, device=items.device)
    outputs = policy.outputs(token, lay_out(user, len(texts)))[at - 1]
    is_id = owner[user[at]] >= 0
    loss = choices_loss(policy, outputs[is_id], policy.space.paths(owner[owner >= 0]))
    return (loss - token_logprobs(policy.language, outputs[~is_id], token[at][~is_id]).sum()) / len(texts)

"""Recommendations from a run, in three lines:

from sagerec import load
recommender = load("RUN")
print(recommender.recommend(["B004756YJA", "B004ZT0SSG"], k=10))
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from sagerec.actions.legal import NO_ITEM
from sagerec.catalogue.dataset import IdMap
from sagerec.config import require
from sagerec.decoding.beam import exact_lists
from sagerec.decoding.cases import distinct_rows
from sagerec.decoding.slates import write_slates
from sagerec.errors import DatasetError
from sagerec.policies.protocol import AnyPolicy
from sagerec.run.folder import open_run


@dataclass(frozen=True, slots=True)
class Recommender:
    """A policy with the names of its items."""

    policy: AnyPolicy
    """In evaluation mode."""
    item_ids: IdMap
    """External item ids."""
    titles: list[str]
    """(N,) titles."""

    def recommend(
        self,
        history: list[str],
        *,
        k: int = 10,
        exclude_history: bool = True,
        slate: bool = False,
        profile: str = "",
    ) -> pl.DataFrame:
        """The next items for a history of item ids, oldest first, of a user of whom `profile` says who it is.

        Returns a table of rank, item_id, title and score: the log-probability of the item in nats. By default
        the k most probable next items, exactly; with `slate`, k items written one after another, whose scores are
        given those before.

        Raises: DatasetError for an unknown item id or an empty history; SettingsError for a profile where the policy
        reads none.
        """
        require(
            not profile or self.policy.reads_profiles,
            "the policy reads no profiles (--policy.profile-tokens, when it is trained); expected none",
        )
        if not history:
            raise DatasetError("the history is empty; expected at least one item id, the oldest first")
        require(k >= 1, f"k is {k}; expected at least 1")
        k = min(k, len(self.item_ids))
        known = torch.from_numpy(self.item_ids.index(history))[None].to(self.policy.device)
        words = torch.tensor(self.policy.profile_words([profile]), dtype=torch.int64, device=self.policy.device)
        items = torch.cat([words, known[:, -self.policy.max_items :]], dim=1)
        lengths = torch.tensor([items.shape[1]], device=self.policy.device)
        excluded = distinct_rows(known) if exclude_history else None
        if slate:
            slates = write_slates(self.policy, items, lengths, k=k, temperature=0.0, excluded=excluded)
            found, scores = slates.items[0, 0], slates.scores()[0, 0]
        else:
            lists = exact_lists(self.policy, items, lengths, k=k, excluded=excluded)
            found, scores = lists.items[0], lists.logprobs[0]
            found, scores = found[found != NO_ITEM], scores[found != NO_ITEM]
        indices = found.tolist()
        return pl.DataFrame(
            {
                "rank": range(1, len(indices) + 1),
                "item_id": self.item_ids.external(indices),
                "title": [self.titles[i] for i in indices],
                "score": scores.tolist(),
            },
            schema={"rank": pl.Int64, "item_id": pl.String, "title": pl.String, "score": pl.Float64},
        )


def load(run: str | Path, *, policy: str = "policy", device: str = "auto") -> Recommender:
    """Load the recommender of a run folder. Raises: ArtifactError."""
    opened = open_run(run)
    loaded, titles = opened.policy(policy, device=device), opened.data.titles(range(opened.data.n_items))
    return Recommender(loaded, opened.data.item_ids, loaded.space.titles(titles))

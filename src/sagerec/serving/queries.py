"""What may be asked, and what is answered: the models that the OpenAPI page is made of."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sagerec.serving.settings import MAX_IDS, MAX_K, MAX_PROFILE, MAX_ROWS, MAX_SLATE

Id = Annotated[str, Field(min_length=1, max_length=512)]
Ids = Annotated[list[Id], Field(max_length=MAX_IDS)]


class Strict(BaseModel):
    """No unknown field, no number in a text, nothing that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class FilterQuery(Strict):
    """What may be shown; the K best of what that leaves are found exactly."""

    categories_in: Ids | None = Field(default=None, description="Only items of one of these categories.")
    categories_out: Ids = Field(default=[], description="No item of one of these categories.")
    items_in: Ids | None = Field(default=None, description="Only these items.")
    items_out: Ids = Field(default=[], description="None of these items.")
    cold_only: bool = Field(default=False, description="Only items of at most 5 interactions in what was learnt.")
    min_score: float | None = Field(
        default=None, description="Only items of at least this score (log-probability in nats)."
    )
    max_per_category: Annotated[int, Field(ge=1, le=MAX_K)] | None = Field(
        default=None,
        description="At most so many items of one narrowest category (of an item's, the one with fewest items).",
    )


NO_FILTERS = FilterQuery()


class Query(Strict):
    """One question; the least is a history."""

    history: Annotated[Ids, Field(min_length=1)] = Field(description="Item ids, the oldest first.")
    k: Annotated[int, Field(ge=1, le=MAX_K)] = Field(default=10, description="Items wanted.")
    policy: Id | None = Field(default=None, description="Which policy of the run; the server's default if not given.")
    exclude_history: bool = Field(default=True, description="Leave out what is in the history.")
    unknown: Literal["skip", "refuse"] = Field(
        default="skip", description="What becomes of unknown ids in the history."
    )
    filters: FilterQuery = Field(default_factory=lambda: NO_FILTERS, description="What may be shown.")
    kind: Literal["list", "slate"] = Field(
        default="list", description="list: the K most probable next items; slate: K items written one after another."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.0, description="Of a slate: 0 takes the most probable item at each place, above it is drawn."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Of a drawn slate: only among the most probable tokens that hold this share."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description="Of a drawn slate: the same seed, the same slate; the answer names the one that was drawn.",
    )
    profile: Annotated[str, Field(max_length=MAX_PROFILE)] = Field(
        default="", description="Who the user is, in words, for a policy that reads profiles."
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind == "list" and (self.temperature, self.top_p, self.seed) != (0, 1, None):
            raise ValueError("temperature, top_p and seed are of slates; expected kind 'slate', or none of them")
        filters = self.filters
        if self.kind == "slate" and (filters.min_score is not None or filters.max_per_category is not None):
            raise ValueError("min_score and max_per_category are of lists; expected kind 'list', or none of them")
        if self.kind == "slate" and self.k > MAX_SLATE:
            raise ValueError(f"k is {self.k}; expected at most {MAX_SLATE} items of a slate")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature is {self.temperature}; expected 0, or at least 0.001")
        return self


class QueryBatch(Strict):
    """Several questions, answered together by one version."""

    queries: Annotated[list[Query], Field(min_length=1, max_length=MAX_ROWS)]


class Item(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str
    categories: list[str]
    cold: bool = Field(description="At most 5 interactions in what was learnt.")


class Listed(Item):
    """An item of an answer."""

    score: float = Field(description="Log-probability in nats; in a slate, given the items before.")
    tokens: list[int] | None = Field(default=None, description="Of a slate: the codes that were written.")
    logprobs: list[float] | None = Field(default=None, description="Of a slate: of the codes that were free, in nats.")


class Answer(BaseModel):
    """What is recommended."""

    items: list[Listed]
    policy: str
    version: str = Field(description="Of catalogue and policies together: all items of an answer are of one.")
    unknown: list[str] = Field(description="Ids of the query that the catalogue does not have.")
    short: str | None = Field(description="Why there are fewer than k items; null where there are k.")
    seed: int | None = Field(description="Of a drawn slate.")


class AnswerBatch(BaseModel):
    """Answers in the order of the queries."""

    answers: list[Answer]


class FoundItems(BaseModel):
    """Items that a search found, those taken most often first."""

    items: list[Item]
    version: str


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str = Field(description="What was got, and what was expected.")

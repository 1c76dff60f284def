"""The browser of example users: history, and the lists of several policies side by side."""

from sagerec.report.examples import PLACES, Examples, Item, User, gather_examples
from sagerec.report.markup import Html, join, tag
from sagerec.report.material import START, Material


def users_section(material: Material) -> Html | None:
    """All examples, one under the other; the script shows one at a time."""
    examples = gather_examples(material)
    if examples is None or not examples.users:
        return None
    shares = "; ".join(f"{label} {share:.1%}" for label, share in examples.shares.items())
    said = (
        f"Test users drawn at random from four groups, so that hits and misses both show; of all test users: {shares}. "
        f"A list counts as having found the item where it stands in the top {PLACES}. Cold: at most "
        f"{examples.cold_max_count} training interactions."
    )
    cards = [user_card(examples, user, number) for number, user in enumerate(examples.users)]
    return join((tag("p", said), controls(examples), tag("div", *cards, id="cards")))


def controls(examples: Examples) -> Html:
    """Which group, which user; hidden until the script runs."""
    groups = [tag("option", "all", value="")]
    groups += [tag("option", label, value=label) for label in dict.fromkeys(user.group for user in examples.users)]
    return tag(
        "div",
        tag("label", "Group ", tag("select", *groups, id="group")),
        tag("label", "User ", tag("select", id="user")),
        tag("button", "Previous", type="button", id="previous"),
        tag("button", "Next", type="button", id="next"),
        tag("span", id="place", role="status"),
        class_="controls",
        id="controls",
        hidden=True,
    )


def user_card(examples: Examples, user: User, number: int) -> Html:
    """One user."""
    earlier = f" (and {user.earlier} before)" if user.earlier else ""
    history = tag("ol", *(tag("li", item_text(item)) for item in user.history), class_="items")
    taken = tag("p", tag("b", "Took next: "), item_text(user.target), class_="taken-line")
    start = {item.item_id for item in user.lists.get(START, [])}
    columns = [tag("div", tag("h4", f"Had{earlier}"), history, class_="column had")]
    for name in examples.policies:
        rank = next((i + 1 for i, item in enumerate(user.lists[name]) if item.item_id == user.target.item_id), None)
        found = f"found at {rank}" if rank else "not found"
        listed = []
        for item in user.lists[name]:
            is_taken = item.item_id == user.target.item_id
            is_new = name != START and item.item_id not in start
            listed.append(tag("li", item_text(item, taken=is_taken, new=is_new), class_="taken" if is_taken else None))
        columns.append(
            tag("div", tag("h4", name, " ", tag("small", found)), tag("ol", *listed, class_="items"), class_="column")
        )
    return tag(
        "article",
        tag("h3", f"User {user.user_id}", " ", tag("small", user.group)),
        taken,
        tag("div", *columns, class_="columns"),
        class_="user",
        aria_label=f"User {user.user_id}",
        data_group=user.group,
        data_name=user.user_id,
        data_number=number,
    )


def item_text(item: Item, *, taken: bool = False, new: bool = False) -> Html:
    """Title, marks and categories."""
    title = item.title if len(item.title) <= 90 else item.title[:89].rstrip() + "…"
    marks = [
        tag("span", "✓ taken", class_="mark is-taken") if taken else None,
        tag("span", "cold", class_="mark is-cold", title=f"{item.count} training interactions") if item.cold else None,
        tag("span", f"not in {START}", class_="mark is-new") if new else None,
    ]
    words = [tag("span", title, class_="title"), *(join((" ", mark)) for mark in marks if mark is not None)]
    if item.categories:
        words.append(tag("span", item.categories, class_="categories"))
    return join(words)

"""The simulated world as files of exactly RecIF-Bench's layout: wide table, maps, captions, tasks."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sagerec.artifacts import write_artifact
from sagerec.config import to_json
from sagerec.files import write_text
from sagerec.recif.items import itemic_text, make_key
from sagerec.recif.layout import LABEL, MESSAGES, METADATA, task_path
from sagerec.recif.simulate import MASKS, Domain, RecifStoreSettings, World, simulate_world
from sagerec.recif.tasks import NO, YES

WIDE, VIDEO_MAP, PRODUCT_MAP = "onerec_bench_release.parquet", "video_ad_pid2sid.parquet", "product_pid2sid.parquet"
CAPTIONS, BENCHMARK = "pid2caption.parquet", "benchmark_data"
COLUMN = {"video": "video", "ad": "ad", "product": "goods"}
"""What the wide table calls a domain."""
TOPICS = ("美食", "旅行", "篮球", "音乐", "舞蹈", "宠物", "科技", "汽车", "育儿", "健身", "钓鱼", "手工")
ASKED = {
    "video": "请预测用户的下一个观看意向。",
    "ad": "请预测用户接下来可能点击的广告视频。",
    "product": "请预测用户接下来可能点击的商品。",
}
DID = {
    "longview": "用户长时观看过以下内容：",
    "like": "用户点赞过以下内容：",
    "follow": "用户关注过以下内容的作者：",
    "forward": "用户转发过以下内容：",
    "not_interested": "用户表示不感兴趣的内容：",
}
SYSTEM = "你是一个智能推荐助手。"
FEW = 60
"""Rows of item_understand and rec_reason, at most, and users of interactive."""
SHOWN = 10
"""Items of each kind of feedback in a prompt, at most, as published."""


def write_benchmark(out: Path, settings: RecifStoreSettings) -> dict[str, int]:
    """Simulate and write all files; returns how many users, items and rows of each task there are."""
    world = simulate_world(settings)
    sizes: dict[str, int] = {
        "users": settings.users,
        **{f"{name}s": len(domain.pids) for name, domain in world.domains.items()},
    }
    with write_artifact(out, "recif", settings=to_json(settings), seed=settings.seed, sizes=sizes) as fresh:
        wide_table(world).write_parquet(fresh / WIDE)
        videos = [world.domains["video"], world.domains["ad"]]
        pid2sid(videos).write_parquet(fresh / VIDEO_MAP)
        pid2sid([world.domains["product"]]).write_parquet(fresh / PRODUCT_MAP)
        captions(videos).write_parquet(fresh / CAPTIONS)
        counts = learnt_counts(world)
        for name, domains, key in (("sid2pid", videos, "pid"), ("sid2iid", [world.domains["product"]], "iid")):
            text = json.dumps(id_map(domains, counts, key))
            (fresh / BENCHMARK).mkdir(exist_ok=True)
            write_text(fresh / BENCHMARK / f"{name}.json", text)
        for task, rows in task_rows(world).items():
            path = task_path(fresh / BENCHMARK, task)
            path.parent.mkdir(parents=True)
            schema = {MESSAGES: pl.String, METADATA: pl.String}
            pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path)
            sizes[task] = len(rows)
    return sizes


def _lists(world: World, domain: str, values: np.ndarray, *, of_history: bool) -> list[list[Any]]:
    """Values (U, T) of histories or of what users took, a list a user."""
    cut = world.history_length(domain)
    if not of_history:
        return values[:, cut:].tolist()  # type: ignore[no-any-return]
    return [row[start:cut].tolist() for row, start in zip(values, world.starts[domain], strict=True)]


def wide_table(world: World) -> pl.DataFrame:
    """One row a user, as `onerec_bench_release.parquet`."""
    columns: dict[str, Any] = {"uid": np.arange(1, world.settings.users + 1), "split": world.is_test.astype(np.int64)}
    videos = world.domains["video"]
    for side in ("hist", "target"):
        for name, domain in world.domains.items():
            pids = domain.pids[world.sequences[name]]
            columns[f"{side}_{COLUMN[name]}_pid"] = _lists(world, name, pids, of_history=side == "hist")
            for mask in MASKS if name == "video" else ():
                values = _lists(world, name, world.feedback[mask], of_history=side == "hist")
                columns[f"{side}_video_{mask}"] = values
            if name == "video" and world.settings.watch_seconds:
                seconds = videos.seconds[world.sequences["video"]].astype(np.float64)
                for column, of in (("watch_seconds", world.watched), ("duration_seconds", seconds)):
                    columns[f"{side}_video_{column}"] = _lists(world, name, of, of_history=side == "hist")
    columns["hist_longview_video_list"] = [
        [pid for pid, long in zip(pids, mask, strict=True) if long]
        for pids, mask in zip(columns["hist_video_pid"], columns["hist_video_longview"], strict=True)
    ]
    people = [_Person(world, user) for user in range(world.settings.users)]
    columns["inter_keyword_to_items"] = [json.dumps(p.keywords(), ensure_ascii=False) for p in people]
    columns["inter_user_profile_with_pid"] = [p.profile(with_sid=False) for p in people]
    columns["inter_user_profile_with_sid"] = [p.profile(with_sid=True) for p in people]
    columns["reco_gsu_caption"] = [p.watched_captions() for p in people]
    columns["reco_target_caption"] = [caption(videos, p.first_target) for p in people]
    columns["reco_cot"] = [p.reasoning() for p in people]
    return pl.DataFrame(columns)


def pid2sid(domains: Sequence[Domain]) -> pl.DataFrame:
    """The pid and sid of every item."""
    pids = np.concatenate([domain.pids for domain in domains])
    codes = np.concatenate([domain.codes for domain in domains])
    return pl.DataFrame({"pid": pids, "sid": codes.tolist()})


def caption(domain: Domain, item: int) -> str:
    """What an item shows, and how long it is."""
    topic = TOPICS[domain.cluster[item]]
    kind = "广告" if domain.name == "ad" else "视频"
    number, seconds = domain.pids[item] % 10_000, domain.seconds[item]
    return f"{topic} {kind} 第{number}集。这是一个关于 {topic} 的{kind}，时长 {seconds} 秒。"


def captions(domains: Sequence[Domain]) -> pl.DataFrame:
    """The pid and dense_caption of videos and ads."""
    rows = [(int(domain.pids[i]), caption(domain, i)) for domain in domains for i in range(len(domain.pids))]
    return pl.DataFrame(rows, schema={"pid": pl.Int64, "dense_caption": pl.String}, orient="row")


def learnt_counts(world: World) -> Counter[int]:
    """How often each pid occurs in the sequences of the training users."""
    found: Counter[int] = Counter()
    for name, domain in world.domains.items():
        pids = domain.pids[world.sequences[name]]
        for user in np.flatnonzero(~world.is_test):
            found.update(pids[user, world.starts[name][user] :].tolist())
    return found


def id_map(domains: Sequence[Domain], counts: Counter[int], key: str) -> dict[str, list[dict[str, int]]]:
    """`sid2pid.json` or `sid2iid.json`: the items of each key, the most frequent first."""
    found: dict[str, list[dict[str, int]]] = {}
    for domain in domains:
        for pid, codes in zip(domain.pids.tolist(), domain.codes.tolist(), strict=True):
            entry = {key: pid, "count": counts[pid], "count_after_downsample": (counts[pid] + 1) // 2}
            found.setdefault(str(make_key(*codes)), []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: -entry["count"])
    return found


class _Person:
    """A user's texts."""

    def __init__(self, world: World, user: int) -> None:
        self.world, self.user, self.uid = world, user, user + 1
        self.videos = world.domains["video"]

    def items(self, domain: str, *, of_history: bool) -> list[int]:
        """Indices of the user's items."""
        cut = self.world.history_length(domain)
        row = self.world.sequences[domain][self.user]
        found: list[int] = (row[self.world.starts[domain][self.user] : cut] if of_history else row[cut:]).tolist()
        return found

    def marked(self, mask: str, *, of_history: bool) -> list[int]:
        """Indices of the user's videos with this feedback."""
        cut = self.world.history_length("video")
        begin, end = (self.world.starts["video"][self.user], cut) if of_history else (cut, None)
        chosen = self.world.feedback[mask][self.user, begin:end].tolist()
        return [i for i, on in zip(self.items("video", of_history=of_history), chosen, strict=True) if on]

    @property
    def first_target(self) -> int:
        return self.items("video", of_history=False)[0]

    def sids(self, domain: str, items: Sequence[int]) -> str:
        """Itemic tokens of items."""
        return "".join(itemic_text(self.world.domains[domain].codes[i].tolist()) for i in items)

    def keywords(self) -> dict[str, list[int]]:
        """Topic -> pids of what the user took of it."""
        found: dict[str, list[int]] = {}
        for item in self.items("video", of_history=False):
            found.setdefault(TOPICS[self.videos.cluster[item]], []).append(int(self.videos.pids[item]))
        return found

    def profile(self, *, with_sid: bool) -> str:
        """What the user likes, in words and items."""
        liked = self.marked("like", of_history=True)[-SHOWN:] or self.items("video", of_history=True)[-3:]
        topics = "、".join(dict.fromkeys(TOPICS[self.videos.cluster[i]] for i in liked))
        shown = self.sids("video", liked) if with_sid else ", ".join(str(self.videos.pids[i]) for i in liked)
        return f"用户喜欢 {topics}。点赞过：{shown}"

    def watched_captions(self) -> str:
        """Captions of the latest videos."""
        return "\n".join(caption(self.videos, i) for i in self.items("video", of_history=True)[-5:])

    def reasoning(self) -> str:
        """Why the user takes the first target."""
        topic = TOPICS[self.videos.cluster[self.first_target]]
        return f"预测分析：用户最近观看的内容之后常常是 {topic}。\n精炼推理：用户接下来会看 {topic} 视频。"


Row = tuple[str, str]


def _row(user_text: str, metadata: dict[str, Any], system: str = SYSTEM) -> Row:
    """Messages and metadata as the task files hold them."""
    texts = [("system", system), ("user", user_text)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts if text]
    return json.dumps(messages, ensure_ascii=False), json.dumps(metadata, ensure_ascii=False)


def task_rows(world: World) -> dict[str, list[Row]]:
    """The rows of all tasks, of the benchmark's users."""
    people = [_Person(world, int(user)) for user in np.flatnonzero(world.is_test)]
    rows = {task: [row for person in people for row in _next_items(person, task)] for task in ASKED}
    rows["label_cond"] = [row for person in people for row in _conditional(person)]
    rows["interactive"] = [row for person in people[:FEW] for row in _interactive(person)]
    rows[LABEL] = [row for person in people for row in _label(person)]
    videos = world.domains["video"]
    rows["item_understand"] = [
        _row(
            f"请描述 {itemic_text(videos.codes[i].tolist())} 的内容",
            {"pid": int(videos.pids[i]), "answer": caption(videos, i)},
        )
        for i in range(min(FEW, len(videos.pids)))
    ]
    rows["rec_reason"] = [
        _row(
            f"{p.profile(with_sid=True)}\n[历史观看视频内容]\n{p.watched_captions()}",
            {"uid": p.uid, "answer": p.reasoning()},
            "",
        )
        for p in people[:FEW]
    ]
    return rows


def _next_items(person: _Person, task: str) -> Iterator[Row]:
    """What the user takes next of a domain, after the videos watched long and the items of the domain."""
    history = person.items(task, of_history=True)
    if task == "video":
        shown = f"用户浏览了以下内容：\n{person.sids(task, history)}"
    else:
        watched = person.marked("longview", of_history=True)
        shown = f"用户观看过的视频：{person.sids('video', watched)}\n用户点击过：{person.sids(task, history)}"
        if not watched and not history:
            return
    targets = person.items(task, of_history=False)
    ids = "answer_iid" if task == "product" else "answer_pid"
    pids = person.world.domains[task].pids[targets].tolist()
    yield _row(f"{shown}\n{ASKED[task]}", {"uid": person.uid, "answer": person.sids(task, targets), ids: pids})


def _did(person: _Person) -> str:
    """The user's feedback on the history, kind by kind."""
    kinds = ((text, person.marked(mask, of_history=True)[-SHOWN:]) for mask, text in DID.items())
    return "\n".join(text + person.sids("video", items) for text, items in kinds if items)


def _conditional(person: _Person) -> Iterator[Row]:
    """What the user will give one kind of feedback, the rarest that there is."""
    kinds = {mask: items for mask in MASKS if (items := person.marked(mask, of_history=False))}
    if not kinds or not (did := _did(person)):
        return
    mask = min(kinds, key=lambda name: len(kinds[name]))
    pids = person.videos.pids[kinds[mask]].tolist()
    text = f"{did}\n请预测用户接下来的内容：{DID[mask]}"
    yield _row(text, {"uid": person.uid, "answer": person.sids("video", kinds[mask]), "answer_pid": pids})


def _interactive(person: _Person) -> Iterator[Row]:
    """What a user wants who names a topic; no ids stand beside the answer."""
    index = {int(pid): i for i, pid in enumerate(person.videos.pids)}
    for keyword, pids in person.keywords().items():
        text = f"用户画像：\n{person.profile(with_sid=True)}\n\n用户查询：{keyword}\n\n请推荐相关内容。"
        answer = person.sids("video", [index[pid] for pid in pids])
        yield _row(text, {"uid": person.uid, "keyword": keyword, "answer": answer})


def _label(person: _Person) -> Iterator[Row]:
    """Whether the user will watch each of some videos long."""
    long = person.marked("longview", of_history=False)
    for item in person.items("video", of_history=False):
        text = f"{_did(person)}\n用户会完整观看视频{person.sids('video', [item])}吗？"
        yield _row(text, {"uid": person.uid, "answer": YES if item in long else NO})

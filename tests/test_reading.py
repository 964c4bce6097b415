"""Every row of a file has one fate, whatever the file holds, and however many processes read it."""

import json

import pytest
from conftest import build_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import ANYTHING, VALUES, damaged

from stagekit import reading
from stagekit.arguments import DataArguments
from stagekit.data import accept_conversation, accept_preference, accept_text
from stagekit.encoding import encode_samples, write_dataset
from stagekit.files import find_files
from stagekit.ledger import REASONS
from stagekit.pairs import encode_pairs, encode_preference
from stagekit.prompts import accept_prompt, encode_prompts, fit_prompt
from stagekit.reading import load_rows
from stagekit.records import RowError
from stagekit.tokenization import document_control, encode_conversation, encode_document, prepare_chat

SOUND = {"instruction": "发烧怎么办？", "output": "多休息，多喝水。"}
ASKED = "发烧怎么办？" * 20
LENGTHY = (
    {"instruction": ASKED, "output": "多休息。"},
    {"prompt": ASKED, "chosen": "多休息。", "rejected": "不管它。"},
    {"prompt": "发烧怎么办？", "chosen": ASKED, "rejected": "不管它。"},
)
LONG = "持续高热要及时就医。" * 350_000  # 10 MB


@pytest.fixture(scope="module")
def chat():
    return prepare_chat(build_tokenizer(), None)


def stage_of(name, chat, limit):
    """(what the stage accepts, what it makes of some rows, what it makes of one record)."""
    control = document_control(chat.tokenizer)

    def document(record):
        return encode_document(control, chat.tokenizer, record.text, limit), 0

    def conversation(record):
        return encode_conversation(chat, record, limit)

    def pair(record):
        return encode_preference(chat, record, limit, True)

    return {
        "pt": (accept_text, lambda rows: encode_samples(rows, document, limit, True), document),
        "sft": (accept_conversation, lambda rows: encode_samples(rows, conversation, limit, False), conversation),
        "rm": (accept_preference, lambda rows: encode_pairs(rows, pair), pair),
        "ppo": (accept_prompt, lambda rows: encode_prompts(rows, chat, limit), lambda r: [fit_prompt(chat, r, limit)]),
    }[name]


def fits(encode, record):
    """Whether a stage makes anything of a record."""
    try:
        return bool(encode(record)[0])
    except RowError:
        return False


def nested(depth):
    value = "deep"
    for _ in range(depth):
        value = [value]
    return value


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(damaged(), damaged(), ANYTHING, VALUES, st.sampled_from([SOUND, *LENGTHY])), min_size=1, max_size=9
    ),
    st.sampled_from(["pt", "sft", "rm", "ppo"]),
    st.sampled_from([24, 60, 400]),
    st.integers(0, 30),
)
def test_rows_read_are_rows_used_and_rows_dropped(tmp_path_factory, chat, records, name, limit, cut):
    account(tmp_path_factory.mktemp("damaged"), chat, records, name, limit, cut)


@pytest.mark.parametrize("name", ["pt", "sft"])
def test_so_they_are_with_records_of_any_size_and_depth(tmp_path, chat, name):
    deep = [{"text": nested(900)}, {"text": "x", "other": nested(400)}, {**SOUND, "input": float("nan")}]
    account(tmp_path, chat, [{**SOUND, "note": LONG}, *deep, {**SOUND, "output": LONG[:100_000]}], name, 60, 3)


@pytest.mark.parametrize("name", ["pt", "sft", "rm", "ppo"])
def test_so_they_are_with_records_that_do_not_fit(tmp_path, chat, name):
    short = {"prompt": "发烧？", "chosen": "休息。", "rejected": "不管。"}
    account(tmp_path, chat, [*LENGTHY, short, SOUND], name, 24, 0)


def account(directory, chat, records, name, limit, cut):
    """Read and encode records between two sound ones, the last of which is cut, and check what became of each."""
    path, whole = directory / "rows.jsonl", json.dumps(SOUND)
    lines = [whole, *map(json.dumps, records), whole]
    content = "\n".join(lines)
    path.write_text(content[: len(content) - cut], encoding="utf-8")  # as a download that broke off
    accept, encode_chunk, encode = stage_of(name, chat, limit)
    rows, ledger, rejected = load_rows([path], accept, DataArguments(str(path), on_bad_row="report"))
    assert ledger.read == len(lines)
    rejected.save(path.with_name("rejected"))
    written = path.with_name("rejected").read_bytes().splitlines() if rejected.count else []
    left_out = [int(json.loads(line)["origin"].rpartition(":")[2]) - 1 for line in written]
    sources = [list(rows.spool.sources[i] for i in rows.spool.source_range(place)) for place in range(len(rows))]
    read = {source for group in sources for source in group}
    assert sorted([*read, *left_out]) == list(range(len(lines)))  # each has one fate
    used = {source for row, group in zip(rows, sources, strict=True) if fits(encode, row.record) for source in group}
    try:
        write_dataset(rows, ledger, encode_chunk, path.with_suffix(".arrow"), rejected)
    except ValueError as error:
        assert not used and "nothing is left to learn from" in str(error)
    assert ledger.used == len(used)
    assert ledger.read == ledger.used + sum(ledger.dropped.values())
    assert set(ledger.dropped) <= set(REASONS)


def test_several_processes_read_what_one_reads(tmp_path, monkeypatch):
    """Rows, trees over several rows, rows without use and rows that cannot be read, in several files."""
    monkeypatch.setattr(reading, "BATCH_BYTES", 300)
    message = {"lang": "en", "deleted": False, "review_result": True}
    tree = [
        {**message, "message_id": "m1", "parent_id": None, "role": "prompter", "text": "Q"},
        *(
            {
                **message,
                "message_id": f"a{rank}",
                "parent_id": "m1",
                "role": "assistant",
                "text": f"A{rank}",
                "rank": rank,
            }
            for rank in range(3)
        ),
        {**message, "message_id": "x", "parent_id": "gone", "role": "assistant", "text": "lost"},
    ]
    talks = [{"instruction": f"question {n}", "output": f"answer {n} " * (n % 7)} for n in range(60)]
    for name, rows in (("a", talks), ("b", [*tree[2:], {"x": 1}, *tree[:2]]), ("c", talks[:3])):
        lines = [json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
    files, found = find_files(str(tmp_path)), []
    for num_workers in (1, 3):
        args = DataArguments(str(tmp_path), on_bad_row="skip", preprocessing_num_workers=num_workers)
        rows, ledger, rejected = load_rows(files, accept_conversation, args, parts=[0, 1, 2])
        columns = [rows.column(name).tolist() for name in ("prompts", "groups", "parts")]
        rejected.save(tmp_path / "rejected")
        sources = [list(rows.spool.sources[i] for i in rows.spool.source_range(n)) for n in range(len(rows))]
        written = (tmp_path / "rejected").read_text(encoding="utf-8")
        found.append((list(rows), columns, sources, rows.settle(ledger).to_dict(), rejected.first, written))
    assert found[0] == found[1]
    rows, columns, sources, ledger, _, _ = found[0]
    # 60 and 3 rows without those whose answer is empty (every seventh), and three threads of one tree
    assert len(rows) == 51 + 2 + 3 and ledger["read"] == 61 + 7 + 4 and ledger["dropped"]["unreadable"] == 4
    assert [row.origin.rpartition("/")[2] for row in rows[51:54]] == ["b.jsonl:5"] * 3
    assert {tuple(sorted(source)) for source in sources[51:54]} == {(61, 62, 65, 66)}

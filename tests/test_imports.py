"""Imports point one way: scripts and tools -> stagekit -> template; no script imports another, no circle exists."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"template", "eval_metrics"}
FILES = [path for pattern in ("*.py", "stagekit/*.py", "tools/*.py") for path in sorted(ROOT.glob(pattern))]
# Who may import whom below the scripts; a new arrow is a decision, made here.
MAY_IMPORT = {
    "eval_metrics": set(),
    "stagekit": set(),
    "stagekit.arguments": {"stagekit.commandline", "template"},
    "stagekit.benchmarks": {
        *("stagekit.choices", "stagekit.data", "stagekit.files", "stagekit.formats", "stagekit.ledger"),
        *("stagekit.prompts", "stagekit.records", "stagekit.seen_prompts"),
    },
    "stagekit.charts": set(),
    "stagekit.chat_tab": {"stagekit.generation", "stagekit.page", "stagekit.prompts"},
    "stagekit.chat_templates": {"template"},
    "stagekit.checkpoint": set(),
    "stagekit.checks": {"stagekit.encoding", "stagekit.seen_prompts", "stagekit.tokenization"},
    "stagekit.choices": {"stagekit.dialogues", "stagekit.records", "stagekit.rewards"},
    "stagekit.commandline": set(),
    "stagekit.comparisons": {"stagekit.dialogues", "stagekit.fields", "stagekit.records", "stagekit.transcripts"},
    "stagekit.contamination": {
        *("stagekit.benchmarks", "stagekit.choices", "stagekit.duplicates", "stagekit.files", "stagekit.records"),
        *("stagekit.texts",),
    },
    "stagekit.curves": set(),
    "stagekit.data": {
        *("stagekit.choices", "stagekit.duplicates", "stagekit.files", "stagekit.hub", "stagekit.ledger"),
        *("stagekit.parallel", "stagekit.reading", "stagekit.records", "stagekit.rows", "stagekit.texts"),
    },
    "stagekit.dialogues": {"stagekit.html_answers", "stagekit.records"},
    "stagekit.docs_tab": {
        *("stagekit.chat_tab", "stagekit.generation", "stagekit.grounding", "stagekit.page", "stagekit.retrieval"),
        *("stagekit.tokenization",),
    },
    "stagekit.documents": set(),
    "stagekit.duplicates": {"stagekit.parallel"},
    "stagekit.embedding": set(),
    "stagekit.encoding": {
        *("stagekit.ledger", "stagekit.parallel", "stagekit.records", "stagekit.rows", "stagekit.tokenization"),
    },
    "stagekit.examination": {
        *("stagekit.contamination", "stagekit.duplicates", "stagekit.encoding", "stagekit.fitting", "stagekit.ledger"),
        *("stagekit.pair_metrics", "stagekit.personal_data", "stagekit.records", "stagekit.rows"),
        *("stagekit.seen_prompts", "stagekit.texts"),
    },
    "stagekit.export": {"stagekit.checkpoint", "stagekit.commandline", "stagekit.seen_prompts"},
    "stagekit.extraction": {"stagekit.documents"},
    "stagekit.fields": {"stagekit.dialogues", "stagekit.records", "stagekit.transcripts"},
    "stagekit.file_readers": {"stagekit.records"},
    "stagekit.files": {"stagekit.file_readers", "stagekit.records"},
    "stagekit.fitting": {
        *("stagekit.data", "stagekit.ledger", "stagekit.pairs", "stagekit.prompts", "stagekit.records"),
        *("stagekit.tokenization",),
    },
    "stagekit.formats": {
        *("stagekit.choices", "stagekit.comparisons", "stagekit.dialogues", "stagekit.fields", "stagekit.records"),
        *("stagekit.transcripts", "stagekit.trees"),
    },
    "stagekit.generation": {
        *("stagekit.arguments", "stagekit.checkpoint", "stagekit.commandline", "stagekit.modeling"),
        *("stagekit.tokenization",),
    },
    "stagekit.grounding": {"stagekit.documents", "stagekit.retrieval"},
    "stagekit.held_out": {
        *("eval_metrics", "stagekit.generation", "stagekit.prompts", "stagekit.rewards", "stagekit.tokenization"),
    },
    "stagekit.html_answers": {"stagekit.records"},
    "stagekit.hub": set(),
    "stagekit.indexing": {"stagekit.documents", "stagekit.retrieval"},
    "stagekit.journal": set(),
    "stagekit.ledger": {"stagekit.records"},
    "stagekit.likelihood": {
        *("stagekit.chat_templates", "stagekit.records", "stagekit.tokenization", "stagekit.trainers"),
    },
    "stagekit.lm_eval_export": {
        *("stagekit.generation", "stagekit.journal", "stagekit.likelihood", "stagekit.tokenization"),
    },
    "stagekit.measuring": {
        *("stagekit.benchmarks", "stagekit.choices", "stagekit.generation", "stagekit.journal", "stagekit.likelihood"),
        *("stagekit.prompts", "stagekit.records", "stagekit.scoring"),
    },
    "stagekit.memory": set(),
    "stagekit.modeling": {"stagekit.checkpoint", "stagekit.memory", "template"},
    "stagekit.openai_format": {"stagekit.commandline", "stagekit.dialogues", "stagekit.records"},
    "stagekit.openai_server": {
        *("stagekit.commandline", "stagekit.generation", "stagekit.openai_format", "stagekit.records"),
        *("stagekit.serving", "stagekit.tokenization"),
    },
    "stagekit.page": {"stagekit.commandline"},
    "stagekit.pair_metrics": set(),
    "stagekit.pairs": {
        *("stagekit.chat_templates", "stagekit.encoding", "stagekit.ledger", "stagekit.records"),
        *("stagekit.tokenization",),
    },
    "stagekit.parallel": set(),
    "stagekit.perplexity": {"stagekit.likelihood"},
    "stagekit.personal_data": set(),
    "stagekit.ppo": {
        *("stagekit.checkpoint", "stagekit.checks", "stagekit.memory", "stagekit.modeling", "stagekit.rollouts"),
        *("stagekit.scoring",),
    },
    "stagekit.prediction": {
        *("stagekit.choices", "stagekit.comparisons", "stagekit.dialogues", "stagekit.fields", "stagekit.files"),
        *("stagekit.formats", "stagekit.generation", "stagekit.journal", "stagekit.prompts", "stagekit.records"),
    },
    "stagekit.prompts": {
        *("stagekit.choices", "stagekit.encoding", "stagekit.ledger", "stagekit.records", "stagekit.tokenization"),
    },
    "stagekit.reading": {
        *("stagekit.choices", "stagekit.files", "stagekit.formats", "stagekit.ledger", "stagekit.parallel"),
        *("stagekit.records", "stagekit.rows", "stagekit.seen_prompts", "stagekit.trees"),
    },
    "stagekit.records": set(),
    "stagekit.report": {"stagekit.checkpoint", "stagekit.report_evaluations", "stagekit.report_reading"},
    "stagekit.report_evaluations": {"stagekit.report_reading"},
    "stagekit.report_findings": {"stagekit.report_text"},
    "stagekit.report_page": {"stagekit.charts", "stagekit.report_findings", "stagekit.report_text"},
    "stagekit.report_reading": set(),
    "stagekit.report_text": set(),
    "stagekit.retrieval": {"stagekit.documents", "stagekit.embedding", "stagekit.extraction", "stagekit.words"},
    "stagekit.rewards": {"eval_metrics"},
    "stagekit.rollouts": {"stagekit.checks", "stagekit.rewards", "stagekit.trainers"},
    "stagekit.rows": {"stagekit.ledger", "stagekit.records"},
    "stagekit.run": {
        *("stagekit.checkpoint", "stagekit.checks", "stagekit.commandline", "stagekit.curves", "stagekit.data"),
        *("stagekit.encoding", "stagekit.held_out", "stagekit.ledger", "stagekit.memory", "stagekit.modeling"),
        *("stagekit.pairs", "stagekit.prompts", "stagekit.records", "stagekit.seen_prompts", "stagekit.tokenization"),
        *("stagekit.trainers",),
    },
    "stagekit.scoring": {
        *("stagekit.arguments", "stagekit.checkpoint", "stagekit.modeling", "stagekit.pairs", "stagekit.tokenization"),
    },
    "stagekit.seen_prompts": {"stagekit.records"},
    "stagekit.serving": {"stagekit.generation", "stagekit.tokenization"},
    "stagekit.texts": {"stagekit.duplicates", "stagekit.prompts", "stagekit.records"},
    "stagekit.tokenization": {"stagekit.chat_templates", "stagekit.modeling", "stagekit.records", "template"},
    "stagekit.trainers": {
        *("stagekit.checkpoint", "stagekit.checks", "stagekit.held_out", "stagekit.modeling", "stagekit.tokenization"),
    },
    "stagekit.transcripts": {"stagekit.dialogues", "stagekit.records"},
    "stagekit.trees": {"stagekit.dialogues", "stagekit.records"},
    "stagekit.verdicts": {
        *("eval_metrics", "stagekit.benchmarks", "stagekit.choices", "stagekit.pair_metrics", "stagekit.prompts"),
        *("stagekit.records", "stagekit.rewards"),
    },
    "stagekit.vocabulary": set(),
    "stagekit.words": set(),
    "template": set(),
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Full names of all the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {member for member in members if (ROOT / f"{member.replace('.', '/')}.py").is_file()}
            found |= modules if modules == members else modules | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def ours(path):
    """The modules of this project among the imports of a file."""
    tops = {"stagekit", "tools", "tests", "conftest", "template", "eval_metrics", *SCRIPTS}
    return {name for name in imports(path) if name.partition(".")[0] in tops}


ARROWS = {module_name(path): ours(path) for path in FILES}


@pytest.mark.parametrize("name", sorted(set(ARROWS) - SCRIPTS - {name for name in ARROWS if name.startswith("tools")}))
def test_a_module_imports_only_what_the_table_allows(name):
    assert name in MAY_IMPORT, f"{name} is new: say in MAY_IMPORT what it may import"
    assert ARROWS[name] <= MAY_IMPORT[name]


def test_the_table_speaks_of_modules_that_exist():
    optional = {"eval_metrics"}  # written by a later stage
    assert set(MAY_IMPORT) - optional <= set(ARROWS)


@pytest.mark.parametrize("name", sorted(SCRIPTS) + sorted(name for name in ARROWS if name.startswith("tools")))
def test_scripts_and_tools_import_no_script_and_no_other_tool(name):
    assert ARROWS[name] <= set(MAY_IMPORT)


@pytest.mark.parametrize("graph", [MAY_IMPORT, ARROWS], ids=["allowed", "found"])
def test_nothing_goes_in_a_circle(graph):
    left = dict(graph)
    while left:
        free = {name for name, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}


def test_template_needs_nothing_but_the_standard_library_and_jinja2():
    assert {name.partition(".")[0] for name in imports(ROOT / "template.py")} <= sys.stdlib_module_names | {"jinja2"}


def test_reading_data_needs_no_model_library():
    heavy = {"torch", "transformers", "peft", "trl"}
    light = (
        "records",
        "dialogues",
        "choices",
        "comparisons",
        "formats",
        "file_readers",
        "files",
        "hub",
        "reading",
        "rows",
        "data",
        "checkpoint",
        "prediction",
        "charts",
        "report",
        "report_evaluations",
        "report_findings",
        "report_page",
    )
    for name in light:
        assert not {found.partition(".")[0] for found in imports(ROOT / f"stagekit/{name}.py")} & heavy, name


def test_all_files_of_the_project_are_looked_at():
    assert {"template", "pretraining", "stagekit", "stagekit.run", "tools.build_starter_model"} <= set(ARROWS)
    assert ARROWS["pretraining"] >= {"stagekit.arguments", "stagekit.run"}
    assert ARROWS["stagekit.run"] >= {"stagekit.checks", "stagekit.data"}
    assert ARROWS["stagekit.data"] >= {"stagekit.reading"}

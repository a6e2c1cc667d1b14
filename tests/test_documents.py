"""What README and guides tell a reader to type: commands parse, configs load, Python runs."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from helpers import random_model
from tokenizers import decoders, models, pre_tokenizers

import ttt_jax
from ttt_jax import config, save_pretrained
from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.cli import parse
from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig
from ttt_jax.config.yaml import checked_fields, load_config, load_fields

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "notebooks").rglob("*.md"))]
END_OF_COMMAND = {"&&", "||", ";", "&", "|", ">", "<", "done"}
# What a loop of the shell puts in the place of a variable.
VARIABLES = {"$config": "configs/pretrain_4b_8k.yaml", "$i": "0"}


def _blocks(language: str) -> list[tuple[Path, str]]:
  pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
  return [(path, text) for path in DOCUMENTS for text in pattern.findall(path.read_text())]


def _words(text: str) -> list[str]:
  """The words of a block, with `;` behind each line that does not go on in the next."""
  words = []
  for line in text.replace("\\\n", " ").splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words += [*lexer, ";"]
  return [VARIABLES.get(word, word) for word in words]


def _commands(program: str) -> list[list[str]]:
  """The words of every call of a program in the bash blocks."""
  found = []
  for _, text in _blocks("bash"):
    words = _words(text)
    for start in (i for i, word in enumerate(words) if word == program):
      ends = (i for i, word in enumerate(words) if i > start and word in END_OF_COMMAND)
      found.append(words[start + 1 : next(ends)])
  return found


COMMANDS = _commands("ttt-jax")


def test_there_are_commands_and_they_are_found_whole():
  assert len(COMMANDS) > 25
  assert [
    "eval",
    "configs/quickstart.yaml",
    "--eval.seq_len",
    "8192",
    "--eval.documents",
    "16",
  ] in (COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_one(words):
  """With fields that exist, of the right types, which the named config takes."""
  parsed = parse(words)
  fields = load_fields(None, parsed.overrides)
  config = Path(str(getattr(parsed, "config", "")))
  if config.parts[:1] == ("configs",) and config.name != "mine.yaml":
    assert (ROOT / config).is_file()
    if not config.name.startswith("ablation_"):
      load_config(ROOT / config, parsed.overrides)
  assert checked_fields(fields) == fields


def test_extras_that_are_installed_exist():
  """In documents and in messages."""
  known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  files = [*DOCUMENTS, *(ROOT / "ttt_jax").rglob("*.py")]
  named = {
    name
    for path in files
    for name in re.findall(r"pip install (?:-e )?['\"](?:ttt_jax|\.)\[(\w+)\]", path.read_text())
  }
  assert {"test", "tpu", "parquet"} <= named
  assert named <= set(known)


def test_yaml_blocks_are_of_a_config():
  for _, text in _blocks("yaml"):
    from ruamel.yaml import YAML

    assert checked_fields(YAML(typ="safe", pure=True).load(text))


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
  """Where the Python blocks run: a small model takes the place of the one that README downloads."""
  model = ModelConfig(
    vocab_size=256, num_layers=2, d_model=16, d_ff=24, num_heads=2, num_kv_heads=1
  )
  fast = TTTConfig(layers=(1,), chunk_size=8, normalize_target=False)
  (tmp_path / "models").mkdir()
  save_pretrained(random_model(model, AttentionConfig(), fast), tmp_path / "models" / "smollm2")
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  Tokenizer(backend).save(tmp_path / "models" / "smollm2")
  (tmp_path / "README.md").write_text((ROOT / "README.md").read_text()[:500])
  monkeypatch.chdir(tmp_path)
  yield tmp_path
  shutil.rmtree(tmp_path / "models")


WITH_PYTHON = sorted({path.relative_to(ROOT) for path, _ in _blocks("python")})


def _run_python(name: Path) -> dict:
  """The names that the Python blocks of a document leave, run in turn and on their own."""
  names = {"__name__": "document"}
  for path, text in _blocks("python"):
    if path == ROOT / name:
      exec(compile(text, str(name), "exec"), names)
  return names


def test_there_are_documents_with_python():
  guides = {
    Path("notebooks/guides", f"{name}.md") for name in ("method", "pretrained", "generation")
  }
  assert {Path("README.md"), *guides} <= set(WITH_PYTHON)


@pytest.mark.parametrize("name", WITH_PYTHON, ids=str)
def test_python_blocks_of_a_document_run(name, working_directory, capsys):
  """One after another, with no names but those that the document itself defines."""
  names = _run_python(name)
  assert jax.device_count() == 8
  match name.stem if name.parent.name == "guides" else str(name):
    case "README.md" | "method":
      assert np.all(np.isfinite(names["y"]))
      assert np.any(names["state"].S != 0)
    case "pretrained":
      assert (working_directory / "models" / "mine" / "config.json").is_file()
    case "generation":
      assert names["answer"].tokens.shape[1] == len(names["question"]) + 40


def test_the_readme_is_short():
  """It leads to the guides instead."""
  lines = (ROOT / "README.md").read_text().splitlines()
  assert len(lines) <= 200
  assert [line for line in lines if len(line) > 100] == []


def test_files_that_are_named_exist():
  """Links between documents, and paths in code style; what commands write is not in the repository."""
  missing = set()
  for path in DOCUMENTS:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
      if not (path.parent / target).exists():
        missing.add((path.name, target))
    for target in re.findall(r"`((?:ttt_jax|configs|notebooks|tests)/[^`\s]*)`", text):
      if path.name != "CHANGELOG.md" and not any(ROOT.glob(target)):
        missing.add((path.name, target))
  assert missing == set()


def test_every_public_name_has_its_place_in_the_site():
  pages = (ROOT / "notebooks/guides/site/api").glob("*.md")
  text = "\n".join(page.read_text() for page in pages)
  sections = {name for name in config.__all__ if isinstance(getattr(config, name), type)}
  assert set(ttt_jax.__all__) | sections <= set(
    re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.MULTILINE)
  )

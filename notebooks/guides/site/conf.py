"""The site: README, guides, notebooks, results, and the reference of the API from the docstrings.

    sphinx-build -W --keep-going -c notebooks/guides/site . build/site

Sources are read where they lie, so that links between files lead where they lead in the repository. A
broken link, a public name that is on no page and one without a docstring are warnings, which -W makes
errors.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import sphinx.util.inspect
import sphinx.util.logging
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer

import ttt_jax
import ttt_jax.config

ROOT = Path(__file__).parents[3]
log = sphinx.util.logging.getLogger("site")

project = "ttt_jax"
copyright = "the authors of ttt_jax, Apache-2.0"
version = release = ttt_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "notebooks/*.ipynb", "notebooks/**.md"]
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"  # the tests execute them
myst_heading_anchors = 4

default_role = (
  "py:obj"  # `name` in a docstring: code, and a link where it is a name of the reference
)
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
toc_object_entries_show_parents = "hide"
autodoc_default_options = {"members": True}
maximum_signature_line_length = 88
napoleon_attr_annotations = False  # shapes such as "*B" are no markup
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "ttt_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

# The pages behind the home page, in the order of a reader; a page that is left out is an error.
GUIDES = [
  f"notebooks/guides/{name}"
  for name in (
    "method",
    "training",
    "meshes",
    "planning",
    "pretrained",
    "generation",
    "evaluation",
    "how_it_works",
    "results",
  )
]
NAVIGATION = f"""
```{{toctree}}
:hidden:
:caption: Guides

{chr(10).join(GUIDES)}
notebooks/guides/site/one_step
```

```{{toctree}}
:hidden:
:caption: Notebooks
:glob:

notebooks/*
```

```{{toctree}}
:hidden:
:caption: Reference

notebooks/guides/site/api/ops
notebooks/guides/site/api/parallel
notebooks/guides/site/api/models
notebooks/guides/site/api/errors
notebooks/guides/site/api/config
genindex
```

```{{toctree}}
:hidden:
:caption: Project

notebooks/results/README
CHANGELOG
CONTRIBUTING
```
"""


def prepare_page(app, document, source):
  """The home page gets the navigation; `ttt_jax.name` in any text leads to the reference."""
  if document.startswith("notebooks/guides/site/") or document.endswith(".ipynb"):
    return
  if (app.srcdir / f"{document}.md").is_file():
    names = "|".join(ttt_jax.__all__)
    parts = re.split(r"(^```.*?^```$)", source[0], flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [
      re.sub(rf"(?<![`\[])`(ttt_jax\.(?:{names}))`(?!\])", r"{py:obj}`\1`", p) for p in parts[::2]
    ]
    source[0] = "".join(parts)
  if document == root_doc:
    source[0] += NAVIGATION


written = {}  # the docstrings before napoleon, by name


def docstring_to_rst(app, what, name, thing, options, lines):
  """Docstrings are Markdown of few kinds: tables and indented formulas become reStructuredText."""
  result, previous, literal = [], "", False
  for line in lines:
    if re.match(r"\|.*\|$", line):
      cells = [cell.strip() for cell in line.strip("|").split("|")]
      if not previous.startswith("|"):
        result += [".. list-table::", "   :header-rows: 1", ""]
      if not re.fullmatch(r"[-:| ]+", line):
        result += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells)]
    elif line in ("Example:", "Examples:"):
      result += [".. rubric:: Example", "", ".. code-block:: python", ""]
    else:
      if line.startswith("    ") and not previous.strip() and not literal:
        result += [".. code-block:: text", ""]
      result.append(line)
    literal = line.startswith("    ") or (literal and not line.strip())
    previous = line
  lines[:] = result
  written[name] = result


def keep_attributes(app, what, name, thing, options, lines):
  """Undoes what napoleon makes of attributes: it takes what stands before a colon for a type."""
  if what in ("attribute", "property") and "Raises:" not in written[name]:
    lines[:] = written[name]


def improve_signature(app, what, name, thing, options, signature, returned):
  """Signatures as they stand in the source."""
  if what == "class" and thing.__module__.startswith("ttt_jax.config"):
    return "", None  # its fields follow, one by one
  if what == "class" and signature == "(*args: Any, **kwargs: Any)":  # what NNX makes of __init__
    written = sphinx.util.inspect.signature(thing.__init__, bound_method=True)
    signature = sphinx.util.inspect.stringify_signature(written, unqualified_typehints=True)
  jax_modules = r"\bjaxlib\._jax\.|\bjax\._src\.[\w.]+\."  # of the arrays in jaxtyping's names
  return tuple(part and re.sub(jax_modules, "", part) for part in (signature, returned))


def skip_member(app, what, name, thing, skip, options):
  """The fields of a NamedTuple are listed in its docstring."""
  return True if type(thing).__name__ == "_tuplegetter" else None


def link_images(app, doctree):
  """A click on a picture opens it in its full size: the page scales it down to the text's width."""
  for image in doctree.findall(nodes.image):
    image["width"] = "100%"


def check_reference(app, env):
  """Warns of public names that are on no page, and of public things that say nothing of themselves."""
  shown = {name.rpartition(".")[2] for name in env.domaindata["py"]["objects"]}
  for package in (ttt_jax, ttt_jax.config):
    for name in package.__all__:
      thing = getattr(package, name)
      if package is ttt_jax.config and not inspect.isclass(thing):
        continue  # checks and constants that the library itself uses
      if name not in shown:
        log.warning("%s.%s is public and on no page of the reference", package.__name__, name)
      for missing in undocumented(thing):
        log.warning("%s is public and has no docstring", missing)


def undocumented(thing) -> list[str]:
  """The public thing, and what of its public members is its own, without a docstring."""
  name = f"{thing.__module__}.{thing.__qualname__}"
  own = (thing.__doc__ or "").strip()
  missing = [] if own and not own.startswith(f"{thing.__name__}(") else [name]
  if not inspect.isclass(thing):
    return missing
  _, _, section = own.partition("Attributes:")
  documented = set(re.findall(r"^\s+(\w+):", section, re.MULTILINE))
  analyzer = ModuleAnalyzer.for_module(thing.__module__)
  documented |= {field for owner, field in analyzer.find_attr_docs() if owner == thing.__qualname__}
  fields = (
    [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
  )
  for member, value in (dict.fromkeys(fields) | vars(thing)).items():
    if member.startswith("_") or member in documented:
      continue
    if member in fields or not (getattr(value, "__doc__", None) or "").strip():
      missing.append(f"{name}.{member}")
  return missing


def write_index(app, error):
  """The site's address leads to the home page."""
  if error is None and app.builder.name == "html":
    page = f'<meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>\n'
    (Path(app.outdir) / "index.html").write_text(page)


def setup(app):
  if Path(app.srcdir) != ROOT:
    raise ExtensionError(f"the sources are those of {ROOT}, not {app.srcdir}: see {__file__}")
  app.connect("source-read", prepare_page)
  app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)  # before napoleon
  app.connect("autodoc-process-docstring", keep_attributes, priority=600)
  app.connect("autodoc-process-signature", improve_signature)
  app.connect("autodoc-skip-member", skip_member)
  app.connect("doctree-read", link_images)
  app.connect("env-check-consistency", check_reference)
  app.connect("build-finished", write_index)

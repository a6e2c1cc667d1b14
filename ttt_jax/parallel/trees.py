"""Names and deletes the arrays of a pytree."""

from typing import Any

import jax


def named_leaves(tree: Any, separator: str = "/") -> dict[str, Any]:
  """Returns the leaves by their path, such as `groups/0/1/mlp/conv/value`, in the tree's order."""
  leaves = jax.tree.leaves_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves
  }
  assert len(named) == len(leaves), "two leaves with one name"
  return named


def delete(tree: Any) -> None:
  """Frees the arrays of a pytree now, even if other references to them exist."""
  for leaf in jax.tree.leaves(tree):
    leaf.delete()

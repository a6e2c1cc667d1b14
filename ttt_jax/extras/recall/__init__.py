"""Makes documents of the recall task, and measures recall accuracy by distance."""

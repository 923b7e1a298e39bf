"""Scene graphs for people: descriptions with class names, and pictures."""

from sgalign.viewing.description import describe, describe_annotations
from sgalign.viewing.drawing import draw_scene_graph

__all__ = ["describe", "describe_annotations", "draw_scene_graph"]

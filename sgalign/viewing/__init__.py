"""Scene graphs for people: descriptions with class names, pictures, and pages."""

from sgalign.viewing.description import describe, describe_annotations
from sgalign.viewing.drawing import draw_scene_graph
from sgalign.viewing.page import PageContent, PageImage, write_page

__all__ = ["PageContent", "PageImage", "describe", "describe_annotations", "draw_scene_graph", "write_page"]

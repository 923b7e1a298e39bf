"""Prediction on image files: finding them, reading them in worker processes, and writing results that can resume."""

from sgalign.prediction.image_paths import ImageFile, find_images
from sgalign.prediction.predicting import FailedImage, PredictedImage, predict_images

__all__ = ["FailedImage", "ImageFile", "PredictedImage", "find_images", "predict_images"]

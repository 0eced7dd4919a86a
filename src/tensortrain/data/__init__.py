"""Data sets that install as ordinary packages, and batches of them."""

from tensortrain.data.batches import ImageBatches, image_batches
from tensortrain.data.image_sets import ImageData, digits, fashion_mnist, images
from tensortrain.data.speech_sets import SpeechData, spoken_prompts
from tensortrain.data.text_batches import TextBatches, text_batches
from tensortrain.data.text_sets import TextData, movie_snippets

__all__ = [
    "ImageBatches",
    "ImageData",
    "SpeechData",
    "TextBatches",
    "TextData",
    "digits",
    "fashion_mnist",
    "image_batches",
    "images",
    "movie_snippets",
    "spoken_prompts",
    "text_batches",
]

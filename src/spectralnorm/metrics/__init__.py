"""How near generated images come to real ones: distances of features, counts of classes, nearest neighbours."""

from spectralnorm.metrics.classes import ClassStatistics, class_statistics
from spectralnorm.metrics.distances import frechet_distance, kernel_distance
from spectralnorm.metrics.evaluation import evaluate
from spectralnorm.metrics.extractors import EXTRACTORS, FeatureExtractor, Features, NetworkExtractor, load_extractor
from spectralnorm.metrics.neighbours import nearest_neighbours

__all__ = [
    "EXTRACTORS",
    "ClassStatistics",
    "FeatureExtractor",
    "Features",
    "NetworkExtractor",
    "class_statistics",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "load_extractor",
    "nearest_neighbours",
]

"""How near generated images come to real ones: distances of features, counts of classes, nearest neighbours."""

from spectralnorm.metrics.classes import ClassStatistics, class_statistics
from spectralnorm.metrics.confidence import MEAN_BOUNDS, betting_bound, empirical_bernstein_bound
from spectralnorm.metrics.critic import CriticOptions, StrictCritic, train_critic
from spectralnorm.metrics.distances import frechet_distance, kernel_distance
from spectralnorm.metrics.evaluation import evaluate
from spectralnorm.metrics.extractors import EXTRACTORS, FeatureExtractor, Features, NetworkExtractor, load_extractor
from spectralnorm.metrics.neighbours import nearest_neighbours
from spectralnorm.metrics.wasserstein import (
    WassersteinBound,
    clipping_interval,
    critic_lower_bound,
    wasserstein_lower_bound,
)

__all__ = [
    "EXTRACTORS",
    "MEAN_BOUNDS",
    "ClassStatistics",
    "CriticOptions",
    "FeatureExtractor",
    "Features",
    "NetworkExtractor",
    "StrictCritic",
    "WassersteinBound",
    "betting_bound",
    "class_statistics",
    "clipping_interval",
    "critic_lower_bound",
    "empirical_bernstein_bound",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "load_extractor",
    "nearest_neighbours",
    "train_critic",
    "wasserstein_lower_bound",
]

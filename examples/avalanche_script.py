"""A learner in an ordinary Avalanche script: handwritten digits, Avalanche's benchmark, metrics and logger.

python examples/avalanche_script.py          # class means of frozen features
python examples/avalanche_script.py ranpac   # or any other learner
"""

import sys

from avalanche.benchmarks import class_incremental_benchmark
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.logging import InteractiveLogger
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from torch.utils.data import Dataset

from cil import load_backbone
from cil.avalanche import as_strategy


class Digits(Dataset):
    def __init__(self, pixels, targets, transform):
        self.pixels, self.targets, self.transform = (pixels * 15).astype("uint8"), targets.tolist(), transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i]).convert("RGB")), self.targets[i]


def main(learner="ncm"):
    backbone = load_backbone()  # the small ViT that comes with cil
    transform = create_transform(**backbone.data_config)
    digits = load_digits()
    split = train_test_split(
        digits.images, digits.target, train_size=600, test_size=200, stratify=digits.target, random_state=0
    )
    benchmark = class_incremental_benchmark(
        {"train": Digits(split[0], split[2], transform), "test": Digits(split[1], split[3], transform)},
        class_order=[3, 1, 4, 5, 9, 2, 6, 8, 7, 0],
        num_classes_per_exp=[2] * 5,
    )
    evaluation = EvaluationPlugin(
        accuracy_metrics(experience=True, stream=True), forgetting_metrics(stream=True), loggers=[InteractiveLogger()]
    )
    strategy = as_strategy(learner, backbone=backbone, evaluator=evaluation)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        results = strategy.eval(benchmark.test_stream)
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])

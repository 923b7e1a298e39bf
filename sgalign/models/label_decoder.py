"""The label decoder of Neural Motifs, which predicts object classes one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from sgalign.data.transfer import send

DROPOUT = 0.2  # dropout probability of the state between steps; all steps drop the same channels
NMS_THRESHOLD = 0.5  # IoU at or above which two detections may not have the same class
GATES = 6  # input, forget, candidate, output, highway gate, highway input; the highway input does not use the state


class LabelDecoder(nn.Module):
    """A highway LSTM over the objects of each image, the same as `DecoderRNN` of Scene-Graph-Benchmark.

    Each step reads an object and the class of the previous object. Images are decoded in parallel, so the number of
    steps is the largest number of objects in an image.

    Args:
        input_dim: number of channels of an object.
        hidden_dim: number of channels of the LSTM.
        num_classes: number of object classes, including the background (0).
        embed_dim: number of channels of a class embedding.
    """

    def __init__(self, input_dim: int, hidden_dim: int, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.hidden_dim, self.num_classes = hidden_dim, num_classes
        self.embedding = nn.Embedding(num_classes + 1, embed_dim)  # the last row marks the start of the sequence
        self.input = nn.Linear(input_dim + embed_dim, GATES * hidden_dim)
        self.state = nn.Linear(hidden_dim, (GATES - 1) * hidden_dim)
        self.out = nn.Linear(hidden_dim, num_classes)
        with torch.no_grad():
            for layer in (self.input, self.state):
                for gate in layer.weight.split(hidden_dim):
                    nn.init.orthogonal_(gate)
                layer.bias.zero_()
            self.state.bias[hidden_dim : 2 * hidden_dim] = 1  # bias of the forget gate

    def load_class_vectors(self, vectors: Tensor) -> None:
        """Initialize the class embeddings with `vectors`, `[num_classes, embed_dim]`."""
        self.embedding.weight.data[:-1].copy_(vectors)

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor,
        places: Tensor,
        labels: Tensor | None = None,
        boxes_per_class: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode the classes of the T objects of B images.

        Args:
            inputs: `[T, input_dim]`, objects grouped by image.
            lengths: int64 `[B]`, number of objects of each image, on the host.
            places: int64 `[T]`, position of each object in its image's sequence, from 0.
            labels: int64 `[T]`, annotated classes for teacher forcing. Each step reads the annotated class of the
                previous object, or the predicted class if the annotated one is the background.
            boxes_per_class: `[T, num_classes, 4]`, x1, y1, x2, y2 in pixels. If these are given and `labels` is None,
                `commit_labels` chooses the classes (SGDet). If both are None, each object gets its best class.

        Returns:
            Logits `[T, num_classes]`, and classes int64 `[T]` from 1. With `labels`, the classes are those that the
            next steps read.
        """
        longest_first = lengths.argsort(descending=True, stable=True)
        images = send(torch.repeat_interleave(longest_first.argsort(), lengths), places.device)
        rows = places.new_zeros(int(lengths.max()) if len(lengths) else 0, len(lengths))
        rows[places, images] = torch.arange(len(images), device=places.device)
        active = (lengths[:, None] > torch.arange(len(rows))).sum(0).tolist()

        weight, label_weight = self.input.weight.split([inputs.shape[1], self.embedding.embedding_dim], dim=1)
        projected = linear(inputs, weight, self.input.bias)
        embedded = linear(self.embedding.weight, label_weight)  # [num_classes + 1, GATES * hidden_dim]
        hidden = memory = inputs.new_zeros(len(lengths), self.hidden_dim)
        kept = dropout(torch.ones_like(hidden), DROPOUT, self.training)
        previous = places.new_full((len(lengths),), self.num_classes)
        logits, said = [], []
        for step, count in enumerate(active):
            now = rows[step, :count]
            hidden, memory = self._cell(projected[now] + embedded[previous[:count]], hidden[:count], memory[:count])
            hidden = hidden * kept[:count]
            logits.append(self.out(hidden))
            previous = logits[-1][:, 1:].argmax(1) + 1
            if labels is not None:
                previous = torch.where(labels[now] > 0, labels[now], previous)
            said.append(previous)
        if not logits:
            return inputs.new_zeros(0, self.num_classes), places.new_zeros(0)
        back = torch.cat([rows[step, :count] for step, count in enumerate(active)]).argsort()
        decoded, predicted = torch.cat(logits)[back], torch.cat(said)[back]
        if labels is None and boxes_per_class is not None:
            per_image = lengths.tolist()
            committed = zip(decoded.split(per_image), boxes_per_class.split(per_image))
            predicted = torch.cat([commit_labels(image, boxes, NMS_THRESHOLD) for image, boxes in committed])
        return decoded, predicted

    def _cell(self, projected: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        *gates, highway_input = projected.chunk(GATES, dim=1)
        summed = [gate + state for gate, state in zip(gates, self.state(hidden).chunk(GATES - 1, dim=1))]
        enter, forget, candidate, leave, highway = summed
        memory = enter.sigmoid() * candidate.tanh() + forget.sigmoid() * memory
        out = leave.sigmoid() * memory.tanh()
        return torch.lerp(highway_input, out, highway.sigmoid()), memory


def commit_labels(logits: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Choose a class for each detection of one image, so that overlapping detections get different classes.

    This is Motifs' non-maximum suppression at evaluation. The (detection, class) with the highest probability is chosen
    first. Then this class is excluded for every other detection whose box of the class has an IoU of at least
    `threshold` with the box of the chosen detection. These two steps repeat until every detection has a class. A
    detection with no other class left can still get an excluded one.

    Args:
        logits: `[N, C]`. Column 0 is the background, which is never chosen.
        boxes: `[N, C, 4]`, x1, y1, x2, y2 for each class, in pixel indices (widths are x2 - x1 + 1).
        threshold: IoU at or above which a class is excluded.

    Returns:
        The classes, int64 `[N]`, from 1.
    """
    count, classes = logits.shape
    scores = logits.detach().float().softmax(1)
    scores[:, 0] = -1
    low = torch.maximum(boxes[:, None, :, :2], boxes[None, :, :, :2])
    high = torch.minimum(boxes[:, None, :, 2:], boxes[None, :, :, 2:])
    common = (high - low + 1).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2] + 1).prod(-1)
    overlaps = common >= threshold * (area[:, None] + area[None] - common)  # [N, N, C]
    labels = torch.zeros(count, dtype=torch.int64, device=logits.device)
    for _ in range(count):
        row, label = divmod(int(scores.argmax()), classes)
        labels[row] = label
        scores[:, label] = scores[:, label].masked_fill(overlaps[row, :, label] & (scores[:, label] > 0), 0)
        scores[row] = -1
    return labels

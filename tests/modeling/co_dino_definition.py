"""Co-DINO's training step by its definition: one image, one group, one query at a time.

Backbone, encoder and the layers of the decoder are the model's own; all else is written again as
loops, without a look at how the model does it.
"""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from co_detr.modeling.geometry import Levels
from co_detr.structures import EncoderMemory
from tests.modeling.builders import NUM_CLASSES, geometry_of

EPS = 1e-3
ONE_MORE = torch.finfo(torch.float32).eps  # added to every normalizer


# --- boxes ---------------------------------------------------------------------------------------


def logit(value, eps=EPS):
    value = value.clamp(0, 1)
    return torch.log(value.clamp(min=eps) / (1 - value).clamp(min=eps))


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def normalized(box, size):
    """xyxy in pixels -> cxcywh."""
    x0, y0, x1, y1 = box[0] / size[1], box[1] / size[0], box[2] / size[1], box[3] / size[0]
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])


def overlap(first, second):
    """Intersection, union and hull of two xyxy boxes."""
    (a0, b0, a1, b1), (c0, d0, c1, d1) = first, second
    width = (torch.minimum(a1, c1) - torch.maximum(a0, c0)).clamp(min=0)
    height = (torch.minimum(b1, d1) - torch.maximum(b0, d0)).clamp(min=0)
    union = (a1 - a0) * (b1 - b0) + (c1 - c0) * (d1 - d0) - width * height
    hull = (torch.maximum(a1, c1) - torch.minimum(a0, c0)) * (
        torch.maximum(b1, d1) - torch.minimum(b0, d0)
    )
    return width * height, union.clamp(min=1e-6), hull.clamp(min=1e-6)


def iou(first, second):
    inner, union, _ = overlap(corners(first), corners(second))
    return inner / union


def giou_in_pixels(first, second, size):
    scale = (size[1], size[0], size[1], size[0])
    first, second = (
        [side * by for side, by in zip(corners(box), scale, strict=True)] for box in (first, second)
    )
    inner, union, hull = overlap(first, second)
    return inner / union - (hull - union) / hull


def sine_code(values, features):
    """Sine and cosine of every value times 2 pi at geometric wavelengths, one after the other."""
    code = []
    for value in values:
        for pair in range(features // 2):
            angle = value * 2 * math.pi / 10000 ** (2 * pair / features)
            code += [angle.sin(), angle.cos()]
    return torch.stack(code)


# --- queries of one image ------------------------------------------------------------------------


def matched_queries(model, memory):
    """Content, references, and logits and boxes of the best encoder proposals."""
    source, proposals = model.queries["matching"], []
    ratios = memory.valid_ratios[0]
    token = 0
    for level, (height, width) in enumerate(memory.level_shapes):
        for row in range(height):
            for column in range(width):
                x = (column + 0.5) / (ratios[level, 0] * width)
                y = (row + 0.5) / (ratios[level, 1] * height)
                side = torch.tensor(0.05 * 2**level, dtype=torch.float64)
                grid = torch.stack([x, y, side, side])
                usable = bool(((grid > 0.01) & (grid < 0.99)).all())
                usable = usable and not memory.padding_mask[0, token]
                features = memory.tokens[0, token] * usable
                features = source.memory_norm(source.memory_proj(features))
                start = torch.log(grid / (1 - grid)) if usable else torch.full((4,), torch.inf)
                box = (source.box_head(features) + start).sigmoid()
                proposals.append((source.class_head(features), box))
                token += 1
    proposals.sort(key=lambda proposal: -proposal[0].max().item())
    best = proposals[: source.num_queries]
    references = torch.stack([box.detach() for _, box in best])
    return source.content.weight, references, best


def denoising_queries(model, image, truths, sizes, draws):
    """Content, references, block and ground truth (None for background) of every slot."""
    embedding = model.queries["denoising"].label_embedding.weight
    longest = max(len(truth) for truth in truths)
    blocks = max(1, model.queries["denoising"].num_queries // longest) if longest else 0
    contents, references, targets = [], [], []
    for block in range(blocks):
        for negative in (0, 1):
            for number in range(longest):
                slot = ((image * blocks + block) * 2 + negative) * longest + number
                if number >= len(truths[image]):
                    contents.append(torch.zeros(embedding.shape[1], dtype=torch.float64))
                    references.append(torch.full((4,), 0.5, dtype=torch.float64))
                    targets.append(None)
                    continue
                label = int(truths[image].gt_classes[number])
                box = normalized(truths[image].gt_boxes.tensor[number], sizes[image])
                if draws.flip[slot] < 0.25:
                    label = int(draws.labels[slot])
                half = torch.stack([box[2], box[3], box[2], box[3]]) / 2
                step = draws.signs[slot] * (draws.shifts[slot] + negative)
                x0, y0, x1, y1 = (torch.stack(corners(box)) + step * half).clamp(0, 1)
                noised = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
                contents.append(embedding[label])
                references.append(logit(noised).sigmoid())
                targets.append(None if negative else number)
    return contents, references, targets, blocks


def positive_queries(model, name, image, candidates, sizes):
    """Content, references, labels, boxes, weights and "is hidden" of positives and fillers.

    The random choice is replaced by the last ones, last first.
    """
    source, dtype = model.auxiliary.positive_queries[name], torch.float64
    found = [
        [i for i, label in enumerate(instances.gt_classes.tolist()) if 0 <= label < NUM_CLASSES]
        for instances in candidates.instances
    ]
    number = max(source.min_queries, min(source.max_queries, max(map(len, found))))
    instances, chosen = candidates.instances[image], found[image]
    if len(chosen) > number:
        chosen = chosen[::-1][:number]
    elif source.padding == "negatives":
        labels = instances.gt_classes.tolist()
        background = [i for i, label in enumerate(labels) if label == NUM_CLASSES]
        chosen = chosen + background[::-1][: number - len(chosen)]
    contents, references, labels, boxes, weights = [], [], [], [], []
    for slot in range(number):
        real = slot < len(chosen)
        reference = target = torch.zeros(4, dtype=dtype)
        label = NUM_CLASSES
        if real:
            index = chosen[slot]
            reference = normalized(instances.proposal_boxes.tensor[index].to(dtype), sizes[image])
            target = normalized(instances.gt_boxes.tensor[index].to(dtype), sizes[image])
            label = int(instances.gt_classes[index])
        code = sine_code(logit(reference, 1e-5).sigmoid(), source.embed_dim // 2)
        contents.append(source.position_norm(source.position_proj(code)))
        references.append(reference)
        labels.append(label)
        boxes.append(target)
        weights.append(float(real))
    hidden = [not weight and source.padding == "mask" for weight in weights]
    return contents, references, labels, boxes, weights, hidden


# --- decoder and losses --------------------------------------------------------------------------


def decode(model, contents, references, memory, may_attend):
    """Logits and boxes of every decoder layer; ``may_attend[i][j]``: query i sees query j."""
    decoder = model.decoder
    content, reference = torch.stack(list(contents)), torch.stack(list(references))
    mask = torch.tensor(may_attend)
    first, second = decoder.query_position.layers
    base, answers = reference, []
    ratios = memory.valid_ratios[0]  # (L, 2)
    for layer, class_head, box_head in zip(
        decoder.layers, decoder.class_heads, decoder.box_heads, strict=True
    ):
        positions = []
        for x, y, w, h in reference:
            x, w, y, h = x * ratios[0, 0], w * ratios[0, 0], y * ratios[0, 1], h * ratios[0, 1]
            code = sine_code((y, x, w, h), content.shape[-1] // 2)
            positions.append(second(F.relu(first(code))))
        by_level = torch.stack([reference * torch.cat([ratio, ratio]) for ratio in ratios], dim=1)
        content = layer(content[None], torch.stack(positions)[None], by_level[None], memory, mask)[
            0
        ]
        output = decoder.output_norm(content)
        boxes = (box_head(output) + logit(base)).sigmoid()
        answers.append((class_head(output), boxes))
        base = (box_head(content) + logit(reference)).sigmoid()
        reference = base.detach()
    return answers


def quality_focal(logits, label, quality):
    """Of one query."""
    loss = 0
    for index, value in enumerate(logits):
        target = quality if index == label else torch.zeros_like(value)
        probability = value.sigmoid()
        entropy = -target * F.logsigmoid(value) - (1 - target) * F.logsigmoid(-value)
        loss = loss + entropy * (target - probability).abs() ** 2
    return loss


def score(rows, size):
    """Losses of one image in one layer: ``rows`` of (logits, box, label, target box, weight)."""
    cls, l1, giou, count = 0, 0, 0, 0
    for logits, box, label, target, weight in rows:
        positive = weight > 0 and label < NUM_CLASSES
        quality = iou(box, target).detach() if positive else torch.zeros(())
        cls = cls + weight * quality_focal(logits, label, quality)
        if positive:
            l1 = l1 + (box - target).abs().sum()
            giou = giou + 1 - giou_in_pixels(box, target, size)
            count += 1
    return cls, l1, giou, count


def hungarian(logits, boxes, truth, size):
    """Index of the ground truth of every query, or None."""
    cost = torch.zeros(len(logits), len(truth))
    for query, (row, box) in enumerate(zip(logits.detach(), boxes.detach(), strict=True)):
        for number, (label, gt) in enumerate(
            zip(truth.gt_classes, truth.gt_boxes.tensor, strict=True)
        ):
            target, p = normalized(gt, size), row[label].sigmoid()
            focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
            l1 = (box - target).abs().sum()
            cost[query, number] = 2 * focal + 5 * l1 - 2 * giou_in_pixels(box, target, size)
    matched = [None] * len(logits)
    for query, number in zip(*linear_sum_assignment(cost.numpy()), strict=True):
        matched[query] = number
    return matched


def as_rows(logits, boxes, numbers, truth, size):
    """What `score` reads, of queries whose ground truths have these numbers."""
    rows = []
    for row, box, number in zip(logits, boxes, numbers, strict=True):
        if number is None:
            rows.append((row, box, NUM_CLASSES, torch.zeros(4), 1.0))
        else:
            target = normalized(truth.gt_boxes.tensor[number], size)
            rows.append((row, box, int(truth.gt_classes[number]), target, 1.0))
    return rows


def one_image(memory, image):
    here = slice(image, image + 1)
    levels = Levels(
        geometry_of(memory.image_sizes[here], memory.geometry.padded),
        level_shapes=memory.level_shapes,
        padding_mask=memory.padding_mask[here],
        valid_ratios=memory.valid_ratios[here],
    )
    return EncoderMemory(memory.tokens[here], levels)


def losses_by_definition(step):
    """All losses by the model's names."""
    model, truths = step.model, step.truth
    memory = model.encode(step.images)
    sizes = memory.image_sizes
    parts: dict[str, list] = {}  # name of group and layer -> per image sums
    for image, size in enumerate(sizes):
        alone, truth = one_image(memory, image), truths[image]
        content, references, proposals = matched_queries(model, alone)
        logits, boxes = (torch.stack(field) for field in zip(*proposals, strict=True))
        rows = as_rows(logits, boxes, hungarian(logits, boxes, truth, size), truth, size)
        parts.setdefault("matching.enc.", []).append(score(rows, size))

        noised, noised_references, numbers, blocks = denoising_queries(
            model, image, truths, sizes, step.draws[0]
        )
        first, total = len(noised), len(noised) + len(content)
        length = first // blocks if blocks else 1
        may_attend = [
            [to >= first or (row < first and row // length == to // length) for to in range(total)]
            for row in range(total)
        ]
        answers = decode(
            model, [*noised, *content], [*noised_references, *references], alone, may_attend
        )
        for layer, (logits, boxes) in enumerate(answers):
            index = "" if layer == len(answers) - 1 else f"d{layer}."
            rows = as_rows(logits[:first], boxes[:first], numbers, truth, size)
            parts.setdefault(f"denoising.{index}", []).append(score(rows, size))
            logits, boxes = logits[first:], boxes[first:]
            rows = as_rows(logits, boxes, hungarian(logits, boxes, truth, size), truth, size)
            parts.setdefault(f"matching.{index}", []).append(score(rows, size))

        for name, candidates in step.candidates.items():
            content, references, labels, targets, weights, hidden = positive_queries(
                model, name, image, candidates, sizes
            )
            may_attend = [
                [row == to or not hidden[to] for to in range(len(content))]
                for row in range(len(content))
            ]
            answers = decode(model, content, references, alone, may_attend)
            for layer, (logits, boxes) in enumerate(answers):
                index = "" if layer == len(answers) - 1 else f"d{layer}."
                rows = list(zip(logits, boxes, labels, targets, weights, strict=True))
                parts.setdefault(f"{name}_queries.{index}", []).append(score(rows, size))
    losses = {}
    for name, images in parts.items():
        cls, l1, giou, count = (sum(terms) for terms in zip(*images, strict=True))
        normalizer = max(count, 1) + ONE_MORE
        for term, value, weight in (("cls", cls, 1), ("bbox", l1, 5), ("giou", giou, 2)):
            losses[f"{name}loss_{term}"] = weight * torch.as_tensor(value) / normalizer
    return losses

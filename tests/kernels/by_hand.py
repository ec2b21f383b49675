"""Every operator written out as loops over rows, heads, pages and slots: what the torch reference is checked against.

Plain Python numbers; no speed, no batching, no trick.
"""

import math

import torch


def softmax(logits, sink=None):
    """Weights of a dict of logits; a sink takes its part and is left out."""
    others = [] if sink is None else [sink]
    largest = max([*logits.values(), *others])
    total = sum(math.exp(logit - largest) for logit in [*logits.values(), *others])
    return {slot: math.exp(logit - largest) / total for slot, logit in logits.items()}


def logit_of(query, key, scale, softcap):
    logit = sum(q * k for q, k in zip(query.tolist(), key.tolist(), strict=True)) * scale
    return logit if softcap is None else softcap * math.tanh(logit / softcap)


def reduced(numbers, rule):
    return max(numbers) if rule == "max" else sum(numbers) / (len(numbers) if rule == "mean" else 1)


def attend(
    kv, query, scale, *, selected=None, softcap=None, sinks=None, page_score="max", group_score="max", rows=None
):
    rows = range(len(kv.bias)) if rows is None else rows.tolist()
    heads, group, size = kv.bias.shape[1], query.shape[1] // kv.bias.shape[1], kv.page_size
    places = kv.num_pages if selected is None else selected.shape[-1]
    output = torch.zeros(len(rows), query.shape[1], 1, kv.values.shape[-1], dtype=torch.float64)
    scores = torch.zeros(len(rows), heads, places, dtype=torch.float64)
    for i, row in enumerate(rows):
        for head in range(heads):
            pages = range(places) if selected is None else selected[i, head].tolist()
            slots = [page * size + lane for page in pages if page >= 0 for lane in range(size)]
            slots = [slot for slot in slots if kv.bias[row, head, slot] == 0]
            by_page = {page: [] for page in pages}
            for member in range(group):
                place = head * group + member
                logits = {
                    slot: logit_of(query[i, place, 0], kv.keys[row, head, slot], scale, softcap) for slot in slots
                }
                weights = softmax(logits, None if sinks is None else sinks[place].item())
                for slot, weight in weights.items():
                    output[i, place, 0] += weight * kv.values[row, head, slot]
                for page, of_group in by_page.items():
                    own = [weight for slot, weight in weights.items() if slot // size == page]
                    of_group.append(reduced([0.0, *own], page_score))
            for index, page in enumerate(pages):
                scores[i, head, index] = reduced(by_page[page], group_score)
    return output, scores


def page_logit_bounds(kv, query, scale, softcap=None, rows=None):
    rows = range(len(kv.bias)) if rows is None else rows.tolist()
    heads, group, size = kv.bias.shape[1], query.shape[1] // kv.bias.shape[1], kv.page_size
    bounds = torch.full((len(rows), heads, kv.num_pages), -math.inf, dtype=torch.float64)
    for i, row in enumerate(rows):
        for head in range(heads):
            for page in range(kv.num_pages):
                slots = [page * size + lane for lane in range(size)]
                keys = [kv.keys[row, head, slot] for slot in slots if kv.bias[row, head, slot] == 0]
                if not keys:
                    continue
                low, high = torch.stack(keys).amin(0).tolist(), torch.stack(keys).amax(0).tolist()
                bounds[i, head, page] = max(
                    sum(max(q * least, q * most) for q, least, most in zip(query.tolist(), low, high, strict=True))
                    for query in query[i, head * group : (head + 1) * group, 0]
                )
                bounds[i, head, page] *= scale
                if softcap is not None:
                    bounds[i, head, page] = softcap * math.tanh(bounds[i, head, page] / softcap)
    return bounds


def victim(kv, row, head):
    pages = [page for page in range(kv.num_pages) if kv.evictable[row, page]]
    return min(pages, key=lambda page: (kv.priority[row, head, page].item(), kv.first[row, head, page].item()))


def append(kv, key, value, visible=None, rows=None, may_close=False):
    for i, row in enumerate(range(len(kv.bias)) if rows is None else rows.tolist()):
        is_visible = visible is None or bool(visible[i])
        for head in range(kv.bias.shape[1]):
            kv.clock[row, head] += 1
            now, decoded = kv.clock[row, head].tolist()
            offset = decoded % kv.page_size
            if offset == 0:
                page = victim(kv, row, head)
                kv.open_slot[row, head] = page * kv.page_size
                for lane in range(kv.page_size):
                    kv.bias[row, head, page * kv.page_size + lane] = -math.inf
                    kv.positions[row, head, page * kv.page_size + lane] = now + lane
                if kv.states is not None:
                    kv.states[row, head, page] = 0
            slot = kv.open_slot[row, head].item() + offset
            page = slot // kv.page_size
            kv.bias[row, head, slot] = 0 if is_visible else -math.inf
            if kv.is_packed:
                kv.open_keys[row, head, offset] = key[i, head, 0]
                pack_value(kv, row, head, slot, value[i, head, 0])
            else:
                kv.keys[row, head, slot], kv.values[row, head, slot] = key[i, head, 0], value[i, head, 0]
            if may_close or offset in (0, kv.page_size - 1):
                kv.priority[row, head, page] = now
            if kv.key_min is not None:
                if offset == 0:
                    kv.key_min[row, head, page], kv.key_max[row, head, page] = math.inf, -math.inf
                if is_visible:
                    kv.key_min[row, head, page] = torch.minimum(kv.key_min[row, head, page], key[i, head, 0])
                    kv.key_max[row, head, page] = torch.maximum(kv.key_max[row, head, page], key[i, head, 0])
            if kv.is_packed and offset == kv.page_size - 1:
                pack_keys(kv, row, head, page)


def four_bits(number, low, high):
    """The nearest of the 16 numbers from `low` to `high`, halves upwards."""
    if low == high:
        return 0
    return min(max(math.floor((number - low) / ((high - low) / 15) + 0.5), 0), 15)


def two_to_a_byte(codes):
    half = len(codes) // 2
    return torch.tensor([codes[i] + 16 * codes[half + i] for i in range(half)], dtype=torch.uint8)


def pack_value(kv, row, head, slot, value):
    low, high = min(value.tolist()), max(value.tolist())
    kv.value_min[row, head, slot], kv.value_max[row, head, slot] = low, high
    kv.values[row, head, slot] = two_to_a_byte([four_bits(number, low, high) for number in value.tolist()])


def pack_keys(kv, row, head, page):
    lanes = range(kv.page_size)
    visible = [lane for lane in lanes if kv.bias[row, head, page * kv.page_size + lane] == 0] or lanes
    codes = [[] for _ in lanes]
    for channel in range(kv.open_keys.shape[-1]):
        keys = kv.open_keys[row, head, :, channel].tolist()
        low, high = min(keys[lane] for lane in visible), max(keys[lane] for lane in visible)
        kv.key_min[row, head, page, channel], kv.key_max[row, head, page, channel] = low, high
        for lane in lanes:
            codes[lane].append(four_bits(keys[lane], low, high))
    for lane in lanes:
        kv.keys[row, head, page * kv.page_size + lane] = two_to_a_byte(codes[lane])


def stamp(kv, scores, alpha, top_ratio, rows=None):
    for i, row in enumerate(range(len(kv.bias)) if rows is None else rows.tolist()):
        for head in range(kv.bias.shape[1]):
            now = kv.clock[row, head, 0].item()
            pages = [page for page in range(kv.num_pages) if kv.evictable[row, page]]
            if alpha is not None:
                milestones = [page for page in pages if scores[i, head, page] >= alpha]
            else:
                held = [page for page in pages if kv.priority[row, head, page] > -math.inf]
                held.sort(key=lambda page: (-scores[i, head, page].item(), kv.first[row, head, page].item()))
                milestones = held[: math.ceil(top_ratio * len(held))]
            for page in milestones:
                kv.priority[row, head, page] = now


def extend(
    kv, query, query_positions, scale, *, softcap=None, sinks=None, page_score="max", group_score="max", observed=None,
    among=None, heads_share=False, rows=None,
):  # fmt: skip
    rows = range(len(kv.bias)) if rows is None else rows.tolist()
    heads, group, size = kv.bias.shape[1], query.shape[1] // kv.bias.shape[1], kv.page_size
    length = query.shape[2]
    tokens = query_positions.expand(len(rows), length).tolist()
    output = torch.zeros(*query.shape[:3], kv.values.shape[-1], dtype=torch.float64)
    scores = torch.zeros(len(rows), heads, kv.num_pages, dtype=torch.float64)
    for i, row in enumerate(rows):
        for step in range(length):
            of_heads = []
            for head in range(heads):
                visible = {
                    slot: position
                    for slot, position in enumerate(kv.positions[row, head].tolist())
                    if kv.bias[row, head, slot] == 0
                }
                own = None if among is None else among[i]
                slots = [slot for slot, position in visible.items() if sees(position, tokens[i], step, own)]
                by_page = [[] for _ in range(kv.num_pages)]
                for member in range(group):
                    place = head * group + member
                    logits = {
                        slot: logit_of(query[i, place, step], kv.keys[row, head, slot], scale, softcap)
                        for slot in slots
                    }
                    weights = softmax(logits, None if sinks is None else sinks[place].item()) if slots else {}
                    for slot, weight in weights.items():
                        output[i, place, step] += weight * kv.values[row, head, slot]
                    for page, of_group in enumerate(by_page):
                        own = [weight for slot, weight in weights.items() if slot // size == page]
                        of_group.append(reduced([0.0, *own], page_score))
                counts = tokens[i][step] in visible.values()  # the mask does not hide the query's own token
                of_heads.append([reduced(of_group, group_score) * counts for of_group in by_page])
            if observed is not None and step < length - observed:
                continue
            for head in range(heads):
                for page in range(kv.num_pages):
                    new = of_heads[head][page]
                    if heads_share:
                        new = reduced([of_head[page] for of_head in of_heads], group_score)
                    before = scores[i, head, page].item()
                    scores[i, head, page] = max(before, new) if page_score == "max" else before + new
    return output, scores


def sees(position, tokens, step, among):
    """Whether the query at `tokens[step]` may see a token, whatever the attention mask hides."""
    if among is None:
        return position <= tokens[step]
    first_new = tokens[-1] + 1 - among.shape[-1]
    return position < first_new or bool(among[step, position - first_new])


def show(kv, visible):
    for row in range(kv.bias.shape[0]):
        for head in range(kv.bias.shape[1]):
            for slot, position in enumerate(kv.positions[row, head].tolist()):
                if 0 <= position <= kv.clock[row, head, 0] and position < visible.shape[1]:
                    kv.bias[row, head, slot] = 0.0 if visible[row, position] else -math.inf

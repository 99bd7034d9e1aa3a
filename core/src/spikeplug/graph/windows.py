"""Codes whose windows are decoded: where activations of a captured network become spikes."""

from __future__ import annotations

from torch import fx

from spikeplug.coding.layers import channels_of, make_spiking
from spikeplug.coding.site import Site

from .draft import Draft
from .operations import Kind
from .products import Product

Reader = tuple[fx.Node, str]
"""An operation that receives spikes, and what the activation is to it: `input`, or an operand of a product."""


def place_windows(draft: Draft) -> int:
    """Code what weighted layers and products read, one window each, shared by all that read it.

    Returns:
        Steps from the input to the result: every window waits for the one before it.
    """
    for node in draft.of_kind("weighted"):
        draft.weigh(node)
    for node in draft.of_kind("product"):
        if not draft.excluded(node):
            draft.swap(node, Product(draft.kinds[node].op), tuple(node.args[:2]))
    coded: dict[fx.Node, Site] = {}
    for source, readers in _readers(draft).items():
        coded[source] = _code(draft, source, readers)
    for node in draft.of_kind("product"):
        module = draft.module(node)
        if isinstance(module, Product):
            wanted = (_operand_site(draft, coded, node, index) for index in (0, 1))
            module.attach(*wanted)
    _decode_for_others(draft, coded)
    return _longest(draft, coded)


def _readers(draft: Draft) -> dict[fx.Node, list[Reader]]:
    found: dict[fx.Node, list[Reader]] = {}
    for node in draft.graph.nodes:
        kind = draft.kinds[node].kind
        if kind == "weighted" and not draft.excluded(node):
            found.setdefault(node.args[0], []).append((node, "input"))
        elif kind == "product" and isinstance(draft.module(node), Product):
            names = operand_kinds(draft, node)
            # A product of which one operand stays dense is dense.
            if any(draft.config.excludes(draft.path(node), *labels_of_operand(draft, node, name)) for name in names):
                continue
            for operand, name in zip(node.args, names, strict=True):
                if (node, name) not in found.setdefault(operand, []):
                    found[operand].append((node, name))
    return found


def labels_of_operand(draft: Draft, node: fx.Node, name: str) -> tuple[str, ...]:
    """The words by which `include` and `exclude` name an operand of a product."""
    return (name, *draft.labels(node))


def operand_kinds(draft: Draft, node: fx.Node) -> tuple[str, str]:
    """What the two operands of a product are: those of attention where a softmax stands before or behind it."""
    if draft.kinds[node].op == "mul":
        return "left", "right"
    if _leads_from_softmax(draft, draft.activations(node)[0]):
        return "probabilities", "value"
    return ("query", "key") if _leads_to_softmax(draft, node) else ("left", "right")


PASSING = ("linear", "affine", "add")
"""Kinds that may stand between the products of attention and their softmax."""


def _is_softmax(draft: Draft, node: fx.Node) -> bool:
    return draft.kinds[node].kind == "nonlinear" and draft.kinds[node].op == "softmax"


def _leads_from_softmax(draft: Draft, node: fx.Node, depth: int = 8) -> bool:
    if _is_softmax(draft, node):
        return True
    if depth == 0 or draft.kinds[node].kind != "linear":
        return False
    return _leads_from_softmax(draft, draft.activations(node)[0], depth - 1)


def _leads_to_softmax(draft: Draft, node: fx.Node, depth: int = 8) -> bool:
    for user in node.users:
        if _is_softmax(draft, user):
            return True
        kind = draft.kinds[user]
        passes = kind.kind in PASSING or (kind.kind == "nonlinear" and kind.op in ("where", "masked_fill"))
        if depth and passes and _leads_to_softmax(draft, user, depth - 1):
            return True
    return False


def _code(draft: Draft, source: fx.Node, readers: list[Reader]) -> Site:
    """The site of an activation; its weighted readers become layers on spikes."""
    first, name = readers[0]
    path = draft.path(first)
    layers = [node for node, kind in readers if kind == "input"]
    if layers:
        name, path = "input", draft.path(layers[0])
        labels: tuple[str, ...] = ("input",)
        channels = channels_of(draft.module(layers[0]))
    else:
        labels = labels_of_operand(draft, first, name)
        channels = _channels(source, name)
        path = f"{path}.{name}"
    names = [draft.path(node) for node in layers] or [path]
    encoder, neuron = draft.config.build_shared(names, *labels)
    site = Site(path, name, encoder, neuron, channels, consumers=len(readers))
    site.sequence = sequence_of(draft, source)
    for index, layer in enumerate(layers):
        module = draft.module(layer)
        assert module is not None
        make_spiking(module, site, owner=index == 0)
    if not layers:
        module = draft.module(first)
        assert isinstance(module, Product)
        module.add_module(f"{name}_site", site)
    return site


MASK = "attention_mask"
"""Name of an input `[B, S]` that is 0 where a position is padding, as transformers' networks have it."""


def sequence_of(draft: Draft, source: fx.Node) -> int | None:
    """The dimension of an activation that is the sequence of the network's mask, counted from the end."""
    mask = next((node for node in draft.captured.inputs if node.name == MASK), None)
    if mask is None or len(mask.meta["dims"]) != 2 or not source.meta["dims"]:
        return None
    dims, length = source.meta["dims"], mask.meta["dims"][1]
    found = [dim for dim, size in enumerate(dims) if dim and size == length]
    return found[0] - len(dims) if len(found) == 1 and dims[0] == draft.captured.batch else None


def _channels(source: fx.Node, name: str) -> tuple[int, ...]:
    """The dimensions of an operand that make up a channel, as in language models: one feature of one head."""
    heads = (1,) if len(source.meta["shape"]) >= 4 else ()
    if name == "probabilities":
        return heads
    return (*heads, -2 if name == "key" else -1)


def _operand_site(draft: Draft, coded: dict[fx.Node, Site], node: fx.Node, index: int) -> Site | None:
    known = [coded.get(operand) for operand in node.args[:2]]  # type: ignore[arg-type]
    return known[index] if None not in known else None


def _decode_for_others(draft: Draft, coded: dict[fx.Node, Site]) -> None:
    """Let what is no layer on spikes read the decoded value."""
    for source, site in coded.items():
        others = [user for user in source.users if not _receives(draft, user, site) and not _asks_size(draft, user)]
        if not others:
            continue
        site.consumers += 1
        where = next(path for path, module in draft.root.named_modules() if module is site)
        with draft.graph.inserting_after(source):
            value = draft.call(where, (source,), Kind("value", "decode"), source, draft.free(f"{site.name}.decoded"))
        for user in others:
            user.replace_input_with(source, value)


def _asks_size(draft: Draft, user: fx.Node) -> bool:
    return draft.kinds[user].kind == "size" and user.meta["shape"] is None


def _receives(draft: Draft, user: fx.Node, site: Site) -> bool:
    module = draft.module(user)
    return getattr(module, "source", None) is site or (isinstance(module, Product) and site in module.sites)


def _longest(draft: Draft, coded: dict[fx.Node, Site]) -> int:
    """Steps along the longest path."""
    until: dict[fx.Node, int] = {}
    for node in draft.graph.nodes:
        before = [until[each] + (coded[each].encoder.steps if each in coded else 0) for each in node.all_input_nodes]
        until[node] = max(before, default=0) + int(getattr(draft.module(node), "delay", 0))
    return max(until.values(), default=0)

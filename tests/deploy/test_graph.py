"""Which nodes are the network."""

from retina_plugin.deploy.graph import network

# image -> normalise -> conv1 -> relu -> conv2 -> logits -> sigmoid
#                                 relu -> add -> deltas -> decode;  size -> decode
NODES = {
    "normalise": [],
    "conv1": ["normalise"],
    "relu": ["conv1"],
    "conv2": ["relu"],
    "logits": ["conv2"],
    "sigmoid": ["logits"],
    "add": ["relu", "conv2"],
    "deltas": ["add"],
    "size": ["normalise"],
    "decode": ["deltas", "size", "relu"],
}


def test_network_is_what_lies_between_convolutions():
    """Without the last ones, what is before the first one and what is after them."""
    found = network(NODES, {"conv1", "conv2", "logits", "deltas"})
    assert found == {"conv1", "relu", "conv2", "add"}


def test_one_convolution_is_a_last_one():
    assert network(NODES, {"conv1"}) == set()

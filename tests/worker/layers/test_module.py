"""The parts of a model can be walked."""

from mgpu.worker.layers.module import Module


class _Leaf(Module):
    pass


class _Tree(Module):
    def __init__(self) -> None:
        self.first = _Leaf()
        self.many = [_Leaf(), _Leaf()]
        self.again = self.first
        self.number = 3


def test_every_part_is_found_once_with_its_dotted_name() -> None:
    tree = _Tree()
    found = dict(tree.named_modules())
    assert found == {"": tree, "first": tree.first, "many.0": tree.many[0], "many.1": tree.many[1]}

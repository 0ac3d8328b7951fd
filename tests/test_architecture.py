"""What may import what."""

import grimp
import pytest


@pytest.mark.parametrize("by_package", [False, True], ids=["modules", "packages"])
def test_no_import_circle(by_package):
    graph = grimp.build_graph("tinysft_jax")
    for package in [name for name in graph.find_children("tinysft_jax") if graph.find_children(name)]:
        if by_package:
            graph.squash_module(package)
    imports = {(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}
    assert not sorted(pair for pair in imports if graph.find_shortest_chain(pair[1], pair[0]))

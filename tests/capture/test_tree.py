"""The modules of a model are found as PyTorch finds them; state that a trace leaves behind its wrappers is seen."""

import torch
from torch import fx, nn

from xdit_ir.capture.state import StateWatch
from xdit_ir.ir.graphs import add_node
from xdit_ir.ir.program import call_block
from xdit_ir.reflection.fingerprint import TRACED
from xdit_ir.reflection.tree import modules_of, named_modules_of


def test_modules_are_those_of_pytorch_in_its_order():
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    late = nn.ModuleDict({"deep": nn.ModuleList([shared, nn.Identity()]), "again": shared})
    model = nn.Sequential(nn.Sequential(late, None, nn.Dropout()), shared, late, nn.Linear(1, 1))
    assert named_modules_of(model) == list(model.named_modules())
    assert modules_of(model) == list(model.modules())
    assert named_modules_of(nn.Identity())[0][0] == ""


def test_wrappers_of_the_tracer_are_no_changes_and_what_is_beside_them_is():
    def wrapper():
        pass

    setattr(wrapper, TRACED, nn.Identity().forward)
    for beside, found in (({}, []), ({"seen": 1}, ["seen"]), ({"training": False}, ["training"])):
        module = nn.Identity()
        watch = StateWatch([("", module)])
        vars(module).update({"forward": wrapper, **beside})
        assert [name for write in watch.changes() for name in write.names] == found


def test_an_added_node_is_found_with_its_operands_and_users():
    graph = fx.Graph()
    x = add_node(graph, "placeholder", "x")
    first = add_node(graph, "call_function", call_block, ("a", "", [x], {"w": x}))
    second = add_node(graph, "call_function", torch.add, (x, first), {"alpha": 2}, "total")
    assert second.name == "total" and list(x.users) == [first, second] and second.all_input_nodes == [x, first]
    assert graph.find_nodes(op="call_function", target=call_block) == [first] and second.kwargs == {"alpha": 2}
    graph.lint()

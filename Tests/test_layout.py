"""Which file imports which, and what no file does: read from the source, so that an import inside a function counts."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from helpers import ROOT

PACKAGES = ("Benchmarks", "CamNet", "Images")
ENVIRONMENT = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}  # what torchrun tells its processes
CHAPTERS = ("Augmentations", "Backbones", "Losses", "Optimizers")
GROUND = ("Utils", "Devices", "Locks", "Distributed", "Signals", "Lazy")


def read_modules():
    """Return {name of a module: syntax tree} of all files but the tests; those of Data/ go by their paths."""
    modules = {}
    for path in ROOT.glob("*.py"):
        modules[path.stem] = ast.parse(path.read_text())
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            modules[name] = ast.parse(path.read_text())
    for path in (ROOT / "Data").glob("*.py"):
        modules[f"Data/{path.name}"] = ast.parse(path.read_text())
    return modules


def imported(tree):
    """Return the dotted names that a file imports, wherever it does; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def edges(modules):
    """Return {module: the modules of this repository that it imports}; a file also imports the package of another."""
    found = {}
    for name, tree in modules.items():
        targets = set()
        for target in imported(tree):
            package = target.partition(".")[0]
            targets.add(target)
            if package != name.partition(".")[0]:
                targets.add(package)
        found[name] = targets & modules.keys()
    return found


def reach(graph, name):
    """Return all modules that importing this one loads, itself included."""
    seen = {name}
    left = [name]
    while left:
        new = graph[left.pop()] - seen
        seen |= new
        left += new
    return seen


MODULES = read_modules()
GRAPH = edges(MODULES)


def is_script(name):
    """Return whether a module is a script; Evaluate, which is one too, is the library of the probes."""
    is_main = any("__main__" in ast.dump(node.test) for node in MODULES[name].body if isinstance(node, ast.If))
    return name.startswith("Benchmarks") or (is_main and "." not in name and name != "Evaluate")


LIBRARIES = sorted(name for name in MODULES if not is_script(name) and "/" not in name)


# ---------------------------------------------------------------------------------------------------- the reader


def test_every_kind_of_import_is_seen():
    source = "import a.b\nfrom c import d as e\ndef f():\n    from g.h import i\n    import j as k\n"
    assert imported(ast.parse(source)) == {"a.b", "c", "c.d", "g.h", "g.h.i", "j"}


def test_reach_goes_through_other_modules_and_packages():
    modules = {"a": "import b", "b": "def f():\n    from p.x import y", "p": "import p.z", "p.x": "", "p.z": ""}
    graph = edges({name: ast.parse(source) for name, source in modules.items()})
    assert reach(graph, "a") == {"a", "b", "p", "p.x", "p.z"}
    assert reach(graph, "p.x") == {"p.x"}


def test_all_modules_are_read():
    scripts = {name for name in MODULES if is_script(name)}
    assert {"TrainSimCLR", "TrainISICLE", "TrainCamNet", "Benchmarks.Arms"} <= scripts
    assert {"Data", "Utils", "Evaluate", "CamNet", "CamNet.Generator", "Images.Shapes"} <= set(LIBRARIES)
    assert "Data/InvertDirStructure.py" in MODULES
    assert {"Data", "TrainSimCLR", "CamNet.Bank"} <= GRAPH["TrainISICLE"]


# ---------------------------------------------------------------------------------------------------- which way


def test_the_baseline_reaches_no_file_of_camnet():
    assert {"Data", "Evaluate", "Images.Shapes", "Losses", "Utils"} <= reach(GRAPH, "TrainSimCLR")
    assert not [name for name in reach(GRAPH, "TrainSimCLR") if name.startswith("CamNet")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_library_imports_a_script(library):
    assert not [name for name in reach(GRAPH, library) if is_script(name)]


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("CamNet")))
def test_camnet_imports_none_of_the_files_above_it(name):
    assert not [other for other in reach(GRAPH, name) if not other.startswith("CamNet")]


@pytest.mark.parametrize("name", [*CHAPTERS, *sorted(name for name in MODULES if name.startswith("Images"))])
def test_chapters_and_images_stand_on_the_ground_alone(name):
    own = name.partition(".")[0]
    others = {other.partition(".")[0] for other in reach(GRAPH, name)}
    assert others <= {own, *GROUND}


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_imports_nothing_but_itself(name):
    assert reach(GRAPH, name) <= set(GROUND)


def test_there_is_no_cycle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_scripts_of_data_stand_alone():
    alone = [name for name in MODULES if name.startswith("Data/")]
    assert alone
    assert not [name for name in alone if GRAPH[name]]
    assert not (ROOT / "Data" / "__init__.py").exists(), "it would hide Data.py from every script"


# ---------------------------------------------------------------------------------------------------- what no file does


def found(kind, condition):
    """Return [(module, line)] of the nodes of a kind for which the condition holds."""
    places = []
    for name, tree in MODULES.items():
        places += [(name, node.lineno) for node in ast.walk(tree) if isinstance(node, kind) and condition(node)]
    return places


def test_nothing_is_imported_by_star():
    assert not found(ast.ImportFrom, lambda node: any(alias.name == "*" for alias in node.names))


def test_nothing_touches_the_import_path():
    assert not found(ast.Attribute, lambda node: ast.unparse(node) == "sys.path")
    assert not found(
        ast.ImportFrom, lambda node: node.module == "sys" and any(each.name == "path" for each in node.names)
    )


def test_nothing_is_moved_by_cuda():
    assert not found(ast.Call, lambda node: isinstance(node.func, ast.Attribute) and node.func.attr == "cuda")


def test_no_module_has_a_device_of_its_own():
    for name, tree in MODULES.items():
        assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        assert "device" not in map(ast.unparse, assigned), name


def test_which_process_this_is_is_asked_in_distributed_alone():
    asked = found(ast.Constant, lambda node: node.value in ENVIRONMENT)
    asked += found(ast.Attribute, lambda node: ast.unparse(node) == "torch.distributed")
    assert {name for name, _ in asked} == {"Distributed", "Benchmarks.Forks"}  # which tells its children, as torchrun
    importing = [name for name, tree in MODULES.items() if any("torch.distributed" in each for each in imported(tree))]
    assert importing == ["Distributed"]

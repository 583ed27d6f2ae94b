"""What code keeps while it is traced is gone afterwards, wherever it keeps it."""

import functools
import weakref
from collections import OrderedDict, deque
from types import ModuleType, SimpleNamespace

import pytest

from bitwright.backend import user_state_kept

TABLE = {"before": 0}
LAST = None
LONG = [0]


@functools.lru_cache
def cached(n):
    return object()


def helper(value):
    TABLE[value] = value
    LONG.append(value)


def remembering(function):
    held = {}

    @functools.wraps(function)
    def inner(n):
        return held.setdefault(n, function(n))

    inner.held = held
    return inner


@remembering
def remembered(n):
    return object()


def counting():
    count = 0

    def step():
        nonlocal count
        count += 1
        return count

    return step


def with_default(value, held=[]):  # noqa: B006 - a cache, as people write them
    held.append(value)
    return held


class Owner:
    def __init__(self):
        self.table = {}


class Refusing(dict):
    def clear(self):
        raise TypeError("it stays")


class Plain:
    table = {}  # noqa: RUF012 - a cache, as people write them
    seen = None

    def __init__(self):
        self.values, self.nested, self.queue = [1], {"a": {}}, deque([1])


class Model(Plain):
    def __init__(self):
        super().__init__()
        self.part, self.tuple, self.step = Plain(), ({},), functools.partial(with_default, 1)

    @property
    def shown(self):
        return helper(9)

    def globals(self):
        global LAST, NEW  # noqa: PLW0603
        helper(1)
        LAST = NEW = self

    def attributes(self):
        self.values.append(2)
        self.values = None
        self.new = 1
        self.nested["a"]["b"] = 1
        self.queue.append(2)
        self.part.values.append(1)
        self.part.seen = 1
        self.tuple[0][1] = 1

    def on_the_class(self):
        type(self).seen = 1
        Plain.table[1] = 2
        Model.other = 3

    def behind_functions(self):
        cached(1)
        remembered(1)
        self.step()
        with_default(2)
        helper.note = 1
        return self.shown


def reachable():
    model = MODEL
    own = {k: str(v) for k, v in model.__dict__.items() if k not in ("part", "step")}
    classes = [{k: v for k, v in vars(c).items() if not k.startswith("__")} for c in (Plain, Model)]
    scope = {k: globals().get(k, "absent") for k in ("LAST", "NEW")}
    return (
        str(own), str(model.part.__dict__), str(classes), str(scope), str(TABLE), str(LONG), str(remembered.held),
        str(with_default.__defaults__), str(helper.__dict__), cached.cache_info().currsize,
    )  # fmt: skip


MODEL = Model()


@pytest.mark.parametrize("way", ["globals", "attributes", "on_the_class", "behind_functions"])
@pytest.mark.parametrize("fails", [False, True])
def test_all_is_put_back(way, fails):
    before = reachable()
    try:
        with user_state_kept(MODEL):
            getattr(MODEL, way)()
            assert reachable() != before
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert reachable() == before


def test_closures_are_put_back():
    step = counting()
    with user_state_kept(step):
        assert step() == 1
    assert step() == 1


def test_what_the_user_had_cached_stays_where_nothing_was_added():
    cached.cache_clear()
    first = cached(5)
    with user_state_kept(MODEL):
        assert cached(5) is first
    assert cached(5) is first


def test_modules_are_looked_into_by_the_names_that_code_uses():
    other = ModuleType("users_other_module")
    exec("store = {}\ndef keep(n):\n    store[n] = n\n", other.__dict__)
    scope = {"other": other, "__name__": "users_module"}
    exec("def run():\n    other.keep(1)\n", scope)
    with user_state_kept(scope["run"]):
        scope["run"]()
        assert other.store
    assert not other.store


def test_objects_of_libraries_are_left_alone_but_for_holders():
    held = SimpleNamespace(a=[])
    with user_state_kept([held]):
        held.a.append(1)
    assert held.a == [1]
    with user_state_kept([held], holders=(SimpleNamespace,)):
        held.a.append(2)
        held.b = 1
    assert held.__dict__ == {"a": [1]}


def test_what_cannot_be_looked_into_is_left_alone():
    """A weak reference's proxy outlives its object, as that of a trainer in the models that it trained."""
    gone, owner = Owner(), Owner()
    owner.table["trainer"], owner.rest = weakref.proxy(gone), [1]
    del gone
    with user_state_kept(owner):
        owner.rest.append(2)
        owner.table["new"] = 3
    assert owner.rest == [1] and list(owner.table) == ["trainer"]


def test_a_container_that_refuses_keeps_no_other_from_being_put_back():
    owner = Owner()
    owner.first, owner.between, owner.last = [1], Refusing(a=1), [1]
    with pytest.raises(TypeError, match="it stays"), user_state_kept(owner):
        owner.first.append(2)
        owner.between["b"] = 2
        owner.last.append(2)
    assert owner.first == owner.last == [1]


class Making(OrderedDict):
    """As transformers' table of activations: holds classes, and gives a new instance at each look."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


class Doubling(dict):
    def __iter__(self):
        return iter([*dict.__iter__(self), "more"])

    def __getitem__(self, key):
        return 2 * dict.get(self, key, 0)

    def keys(self):
        return list(self)


class Counting(list):
    def __iter__(self):
        return iter(range(len(self)))


@pytest.mark.parametrize("change", [False, True])
def test_containers_hold_what_they_held_whatever_they_give_when_asked(change):
    def held():
        ordered = [(k, dict.__getitem__(making, k)) for k in OrderedDict.__iter__(making)]
        return ordered, list(dict.items(doubling)), list(list.__iter__(counting))

    making, doubling, counting = Making(a=Plain, b=Owner), Doubling(c=3), Counting([7, 8])
    making.move_to_end("a")
    before = held()
    with user_state_kept(SimpleNamespace(all=[making, doubling, counting]), making, doubling, counting):
        if change:
            making["d"], doubling["d"] = list, 4
            counting.append(9)
    assert held() == before

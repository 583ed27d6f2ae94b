import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    from search_net import write

    return write(tmp_path_factory.mktemp("search"))

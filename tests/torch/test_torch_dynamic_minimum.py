"""What a user says of free dimensions holds for the check of captures too."""

import numpy as np
import pytest
import torch
from torch.export import Dim

from bitwright.errors import ModelError
from bitwright_torch.capture.capturing import capture


class OneIsAnother(torch.nn.Module):
    """Treats a single row in another way."""

    def forward(self, x):
        return x * 2 if x.shape[0] > 1 else x


def test_rows_below_the_minimum_are_not_asked_for():
    x = torch.arange(12.0).reshape(4, 3)
    with pytest.raises(ModelError, match=r"min=2"):
        capture(OneIsAnother(), x, dynamic_shapes={"x": (0,)})
    model = capture(OneIsAnother(), x, dynamic_shapes={"x": {0: Dim("rows", min=2)}})
    np.testing.assert_array_equal(model(x[:3]).numpy(), 2 * x[:3].numpy())

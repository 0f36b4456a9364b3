"""A data set for the tests of the preflight."""

import pytest

from tests.data_loading.preflight_data import Data


@pytest.fixture
def data(tmp_path):
    data = Data(tmp_path)
    data.write()
    return data

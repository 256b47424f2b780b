import pytest
from stacks import random_data


@pytest.fixture(scope="session")
def data():
    """What stacks are trained on: see stacks.random_data. No test changes it."""
    return random_data()

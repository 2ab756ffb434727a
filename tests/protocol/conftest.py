"""Let the tests of this folder import the helpers that lie beside them."""

"""Target models: loading, conversion, reading single weights, packing linear layers."""

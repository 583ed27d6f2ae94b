"""Conformance kits for people who write a backend or a technique, and the reference backend that they run on.

`reference`, `kernels`, `builder`, `models`: a small framework-free model. `harness`: run one technique alone.
`backend_contract` (in four parts), `technique_contract`: pytest classes to subclass; only these need pytest.
"""

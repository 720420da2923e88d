# SPDX-License-Identifier: Apache-2.0
"""SAGE and sageLLM over the transport engine; docs/sage.md is the user's guide.

``comm_backend`` is the entry of ``sagellm.comm_backends``: ranks (``rendezvous``), messages between
two of them (``point_to_point``, ``payload``, ``turns``, ``verdict``) and the collectives that the interface asks for.
``mapping`` translates ``sagellm_protocol``'s types. ``inference_backend`` says what an inference
engine must do for SAGE, ``vllm_backend`` and ``sglang_backend`` do it. ``check`` says what of SAGE is here. The
plugin of SAGE's command line is a face of ours: ``cli/sage_app.py`` and ``cli/sage_serve.py``.
"""

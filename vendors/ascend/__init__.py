# SPDX-License-Identifier: Apache-2.0
"""Huawei Ascend: NPUs through CANN's ACL."""

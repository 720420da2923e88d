# SPDX-License-Identifier: Apache-2.0
"""Every option of the transport (``options``), the layers they come from (``layers``), and files (``file``)."""

from sage_kv_connector.config.layers import CONFIG_FILE_ENV as CONFIG_FILE_ENV
from sage_kv_connector.config.layers import Layers as Layers
from sage_kv_connector.config.layers import layered as layered
from sage_kv_connector.config.layers import options_of_words as options_of_words
from sage_kv_connector.config.layers import presets as presets
from sage_kv_connector.config.options import LONGEST_S as LONGEST_S
from sage_kv_connector.config.options import PREVIOUS_SECRET_ENV as PREVIOUS_SECRET_ENV
from sage_kv_connector.config.options import PREVIOUS_SECRET_FILE_ENV as PREVIOUS_SECRET_FILE_ENV
from sage_kv_connector.config.options import SECRET_ENV as SECRET_ENV
from sage_kv_connector.config.options import SECRET_FILE_ENV as SECRET_FILE_ENV
from sage_kv_connector.config.options import KVTransportConfig as KVTransportConfig
from sage_kv_connector.config.options import Security as Security
from sage_kv_connector.config.refusal import HIDDEN as HIDDEN
from sage_kv_connector.config.refusal import SECRET_FIELDS as SECRET_FIELDS
from sage_kv_connector.config.refusal import OptionError as OptionError
from sage_kv_connector.config.refusal import option_error as option_error

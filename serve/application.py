"""The Serve application with its default settings, for `serve build serve.application:application`.

`serve build` takes no application builders. The config that it writes imports this application; the config of
`serve deploy` passes settings to `serve.app:build` instead.
"""

from serve.app import build
from serve.settings import Settings

application = build(Settings.model_validate({}))

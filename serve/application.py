"""The Serve application with its default settings, for `serve build serve.application:application`.

`serve build` takes no builders; its config names this application, where that of `serve deploy` passes settings to
`serve.app:build`.
"""

from serve.app import build
from serve.settings import Settings

application = build(Settings.model_validate({}))

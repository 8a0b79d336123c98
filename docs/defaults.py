"""Shows the value of a default where a signature has `DEFAULTS["lr"]`."""

import griffe


class Defaults(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        table = pkg["hyperparameters.TABLE"].value
        defaults = {
            f"DEFAULTS[{key}]": row.arguments[0]
            for key, row in zip(table.keys, table.values, strict=True)
        }
        for function in (pkg["optimizer.RAdam.__init__"], pkg["functional.radam_"]):
            for parameter in function.parameters:
                default = str(parameter.default)
                parameter.default = defaults.get(default, parameter.default)

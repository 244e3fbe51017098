"""An import-linter contract that lists what may be imported, where the built-in kinds list what may not."""

import sys
from typing import cast

from grimp import ImportGraph
from importlinter.application import output
from importlinter.domain import fields
from importlinter.domain.contract import Contract, ContractCheck
from importlinter.domain.imports import Module


class AllowedImportsContract(Contract):
    """Only the standard library, the package itself and `allowed` may be imported by modules of `package`.

    A list of forbidden packages would have to name every distribution there is."""

    package = fields.ModuleField()
    allowed = fields.SetField(subfield=fields.StringField(), required=False, default=frozenset())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        del verbose
        package = cast("Module", self.package).name
        allowed = sys.stdlib_module_names | {package} | cast("set[str]", self.allowed)
        illegal = sorted(
            (importer, imported)
            for importer in {package} | graph.find_descendants(package)
            for imported in graph.find_modules_directly_imported_by(importer)
            if imported.partition(".")[0] not in allowed
        )
        return ContractCheck(kept=not illegal, metadata={"illegal": illegal})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for importer, imported in check.metadata["illegal"]:
            output.print_error(f"{importer} is not allowed to import {imported}", bold=False)

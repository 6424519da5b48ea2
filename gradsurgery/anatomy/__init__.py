"""WHERE surgery acts: units and regions of any model."""

from gradsurgery.anatomy.anatomy import Anatomy
from gradsurgery.anatomy.groups import Footprint, UnitGroup
from gradsurgery.anatomy.layouts import Layout
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.select import region
from gradsurgery.anatomy.units import Units

__all__ = ["Anatomy", "Footprint", "Layout", "Region", "UnitGroup", "Units", "region"]

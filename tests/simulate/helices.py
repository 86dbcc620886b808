"""Proteins of upright helices, and a clamp of them that turns by a known screw."""

from __future__ import annotations

import gemmi
import numpy as np
from scipy.spatial.transform import Rotation

from cryo_lib.simulate.atoms import Atoms, with_positions


def positions(structure):
    return Atoms.of(structure).xyz


def helices(**starts):
    """Chains of upright helices of 12 alanines that begin at `starts`; residue numbers jump from helix to helix."""
    structure = gemmi.Structure()
    structure.add_model(gemmi.Model(1))
    places = (("N", 1.5, -28, -0.9), ("CA", 2.3, 0, 0.0), ("C", 1.7, 27, 1.1), ("O", 2.0, 20, 2.3))
    for name, corners in starts.items():
        chain = gemmi.Chain(name)
        for helix, k in np.ndindex(len(corners), 12):
            residue = gemmi.Residue()
            residue.name, residue.entity_type = "ALA", gemmi.EntityType.Polymer
            residue.seqid = gemmi.SeqId(100 * helix + k + 1, " ")
            for atom_name, radius, turn, z in places:
                angle = np.radians(100 * k + turn)
                atom = gemmi.Atom()
                atom.name, atom.element = atom_name, gemmi.Element(atom_name[0])
                offset = np.array([radius * np.cos(angle), radius * np.sin(angle), 1.5 * k + z])
                atom.pos = gemmi.Position(*(corners[helix] + offset))
                residue.add_atom(atom)
            chain.add_residue(residue)
        structure[0].add_chain(chain)
    structure.setup_entities()
    return structure


def peptide(name="C"):
    return helices(**{name: [(0, 0, 0)]})


def moved(structure, rotation, shift, chains=None):
    """The structure, or these of its chains, rotated about the origin, then shifted."""
    chain = np.array([site.chain.name for site in structure[0].all()])
    xyz, which = positions(structure), np.isin(chain, chains or list(set(chain)))
    xyz[which] = rotation.apply(xyz[which]) + shift
    return with_positions(structure, xyz)


HINGE, AXIS = np.array([10.0, 25.0, 0.0]), np.array([0.36, 0.48, 0.8])
TURN, RISE = np.radians(20) * AXIS, 3.0 * AXIS
AWAY = Rotation.from_euler("ZYZ", [50, 80, 20], degrees=True), np.array([30.0, -9.0, 4.0])


def toy(fraction):
    """A core C and, out of its reach, a clamp D moved by a share of a known screw: `TURN` about `HINGE`, and `RISE`."""
    core, clamp = ([(x, y, 0) for x in (0, 10, 20) for y in ys] for ys in ((0, 10), (40, 50, 60)))
    turn = Rotation.from_rotvec(fraction * TURN)
    return moved(helices(C=core, D=clamp), turn, HINGE - turn.apply(HINGE) + fraction * RISE, ["D"])


def one_chain(structure):
    """The clamp's residues behind the core's, in one chain, numbered on."""
    clamp = structure[0]["D"].clone()
    structure[0].remove_chain("D")
    for residue in clamp:
        residue.seqid.num += 600
        structure[0]["C"].add_residue(residue)
    structure.setup_entities()
    return structure


NAMES = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split()


def sequenced(structure, **seeds):
    """The structure with residues drawn by a seed for each of its chains."""
    for name, seed in seeds.items():
        for residue, drawn in zip(structure[0][name], np.random.default_rng(seed).choice(NAMES, 1000)):
            residue.name = drawn
    return structure


def renumbered(structure, by):
    for chain in structure[0]:
        for residue in chain:
            residue.seqid.num += by
    return structure

"""A method of a user's own, all there is to it."""

from secateur.methods import TrainingMethod
from secateur.settings import option, settings


@settings
class Halfway(TrainingMethod):
    name, summary = "halfway", "cut the units with the smallest filters"
    at: float = option("share of the steps after which they leave", default=0.5, above=0, below=1)

    def advance(self, session):
        if session.step == round(self.at * session.steps):
            session.cut(session.choose([self.rank(session, group) for group in session.graph.groups]))

    def rank(self, session, group):
        return sum(m.take(session.tensors[m.tensor]).abs().sum(1) for m in group.members if m.role == "out")

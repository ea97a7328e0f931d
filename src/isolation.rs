//! How strong a sandbox is, layer by layer: what is demanded of a worker, and what it has.
//!
//! A layer is tried when the worker starts. One that is required and can't be had keeps the worker from starting, with
//! the reason; one that is preferred is then left out, which is logged. From then on every build has exactly what
//! [`Strength`] says, or fails.

use std::fmt;
use std::str::FromStr;

use cofferdam_sandbox::Identity;
use cofferdam_sandbox::cgroup::Controller;
use cofferdam_sandbox::ids::OwnIds;
use cofferdam_sandbox::seccomp::Profile;

/// The name of the response metadata that carries a build's [`Strength`].
pub const METADATA: &str = "x-cofferdam-isolation";

/// What is demanded of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Without it there are no builds.
    Required,
    /// It is there if it can be had.
    Preferred,
    /// It is left out.
    Off,
}

/// A layer that can be demanded. Namespaces of its own every build has; of its network the operator decides apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// User and group ids that no other running build has.
    Ids,
    /// The filter of system calls.
    Seccomp,
    /// The Landlock domain around abstract sockets and signals.
    Landlock,
    /// A cgroup that limits memory and processes of a build as a whole.
    Cgroup,
    /// Inputs shown by FUSE, not laid out as files.
    Inputs,
}

impl Layer {
    /// All of them.
    pub const ALL: [Layer; 5] = [Layer::Ids, Layer::Seccomp, Layer::Landlock, Layer::Cgroup, Layer::Inputs];
}

/// What is demanded of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demands {
    /// Of [`Layer::Ids`].
    pub ids: Demand,
    /// Of [`Layer::Seccomp`].
    pub seccomp: Demand,
    /// Of [`Layer::Landlock`].
    pub landlock: Demand,
    /// Of [`Layer::Cgroup`].
    pub cgroup: Demand,
    /// Of [`Layer::Inputs`].
    pub inputs: Demand,
}

impl Default for Demands {
    fn default() -> Self {
        Self {
            ids: Demand::Preferred,
            // Every kernel that has the rest of what a build takes has this.
            seccomp: Demand::Required,
            landlock: Demand::Preferred,
            cgroup: Demand::Preferred,
            inputs: Demand::Preferred,
        }
    }
}

impl Demands {
    /// What is demanded of one layer.
    pub fn of(&mut self, layer: Layer) -> &mut Demand {
        match layer {
            Layer::Ids => &mut self.ids,
            Layer::Seccomp => &mut self.seccomp,
            Layer::Landlock => &mut self.landlock,
            Layer::Cgroup => &mut self.cgroup,
            Layer::Inputs => &mut self.inputs,
        }
    }
}

/// A layer that is required and can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("isolation layer {layer} is required, but can't be had: {reason}")]
pub struct Lacking {
    /// The layer.
    pub layer: Layer,
    /// Why not.
    pub reason: String,
}

impl Demand {
    /// Has the layer, if it is demanded. `attempt` yields it, or says why it can't be had.
    ///
    /// # Errors
    /// Where it is required and can't be had.
    pub fn settle<T, E: fmt::Display>(
        self,
        layer: Layer,
        attempt: impl FnOnce() -> Result<T, E>,
    ) -> Result<Option<T>, Lacking> {
        if self == Demand::Off {
            return Ok(None);
        }
        match (attempt(), self) {
            (Ok(had), _) => Ok(Some(had)),
            (Err(reason), Demand::Required) => Err(Lacking { layer, reason: reason.to_string() }),
            (Err(reason), _) => {
                tracing::info!("builds do without isolation layer {layer}: {reason}");
                Ok(None)
            }
        }
    }
}

/// What a build's sandbox is made of. Its text, as in `ids=own; seccomp=parity; network=none`, is what clients get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strength {
    /// Whose ids builds run under.
    pub ids: Ids,
    /// What system calls are refused.
    pub seccomp: Option<Profile>,
    /// The version of Landlock whose scopes builds are kept in.
    pub landlock: Option<u32>,
    /// What a cgroup limits; empty without one.
    pub cgroup: Vec<Controller>,
    /// How inputs are shown.
    pub inputs: Inputs,
    /// What the build reaches.
    pub network: Network,
}

/// Whose ids builds run under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// Each under one that no other running build has.
    Own,
    /// All under that of the worker.
    Shared,
}

impl From<&Identity> for Ids {
    fn from(identity: &Identity) -> Self {
        match identity {
            Identity::Root { .. } | Identity::Range { .. } => Ids::Own,
            Identity::Single => Ids::Shared,
        }
    }
}

impl From<Ids> for OwnIds {
    fn from(ids: Ids) -> Self {
        match ids {
            Ids::Own => OwnIds::Wanted,
            Ids::Shared => OwnIds::Unwanted,
        }
    }
}

/// How inputs are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    /// As a file system of the store, over FUSE.
    Fuse,
    /// Laid out as files for each build.
    Copies,
}

/// What a build reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Itself.
    None,
    /// What the host does but for the host itself, from a namespace of its own.
    Pasta,
    /// All that the host does, in the host's own namespace.
    Host,
}

impl fmt::Display for Strength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = match self.ids {
            Ids::Own => "own",
            Ids::Shared => "shared",
        };
        let namespaces = match self.network {
            Network::Host => "user,mnt,pid,ipc,uts,cgroup",
            Network::None | Network::Pasta => "user,mnt,pid,net,ipc,uts,cgroup",
        };
        let inputs = match self.inputs {
            Inputs::Fuse => "fuse",
            Inputs::Copies => "copies",
        };
        let network = match self.network {
            Network::None => "none",
            Network::Pasta => "pasta",
            Network::Host => "host",
        };
        let seccomp = self.seccomp.map_or("none".into(), |profile| profile.to_string());
        let landlock = self.landlock.map_or("none".into(), |version| version.to_string());
        let cgroup: Vec<&str> = self.cgroup.iter().map(|controller| controller.name()).collect();
        let cgroup = if cgroup.is_empty() { "none".into() } else { cgroup.join(",") };
        write!(f, "ids={ids}; namespaces={namespaces}; seccomp={seccomp}; landlock={landlock}; ")?;
        write!(f, "cgroup={cgroup}; inputs={inputs}; network={network}")
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layer::Ids => "ids",
            Layer::Seccomp => "seccomp",
            Layer::Landlock => "landlock",
            Layer::Cgroup => "cgroup",
            Layer::Inputs => "inputs",
        })
    }
}

/// `LAYER=required|preferred|off`, as on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The layer.
    pub layer: Layer,
    /// What is demanded of it.
    pub demand: Demand,
}

impl FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (layer, demand) = text.split_once('=').ok_or("it has no \"=\"")?;
        let layer = Layer::ALL.into_iter().find(|known| known.to_string() == layer).ok_or_else(|| {
            format!(
                "there is no layer \"{layer}\"; there are {}",
                Layer::ALL.map(|layer| layer.to_string()).join(", ")
            )
        })?;
        let demand = match demand {
            "required" => Demand::Required,
            "preferred" => Demand::Preferred,
            "off" => Demand::Off,
            _ => return Err(format!("\"{demand}\" is none of required, preferred, off")),
        };
        Ok(Self { layer, demand })
    }
}

/// As it is read.
impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let demand = match self.demand {
            Demand::Required => "required",
            Demand::Preferred => "preferred",
            Demand::Off => "off",
        };
        write!(f, "{}={demand}", self.layer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_had_or_refused_or_left_out() {
        let has = || Ok::<_, String>(1);
        let lacks = || Err::<u8, _>("no such thing");
        let refused = Lacking { layer: Layer::Inputs, reason: "no such thing".into() };
        for (demand, with, without) in [
            (Demand::Required, Ok(Some(1)), Err(refused)),
            (Demand::Preferred, Ok(Some(1)), Ok(None)),
            (Demand::Off, Ok(None), Ok(None)),
        ] {
            assert_eq!(demand.settle(Layer::Inputs, has), with, "{demand:?}");
            assert_eq!(demand.settle(Layer::Inputs, lacks), without, "{demand:?}");
        }
    }

    #[test]
    fn strength_is_told_in_one_line() {
        let strength = Strength {
            ids: Ids::Own,
            seccomp: Some(Profile::Strict),
            landlock: None,
            cgroup: vec![Controller::Memory, Controller::Pids],
            inputs: Inputs::Copies,
            network: Network::None,
        };
        assert_eq!(
            strength.to_string(),
            "ids=own; namespaces=user,mnt,pid,net,ipc,uts,cgroup; seccomp=strict; landlock=none; \
             cgroup=memory,pids; inputs=copies; network=none"
        );
    }

    #[test]
    fn wishes_are_read() {
        let wish = |text: &str| text.parse::<Wish>();
        assert_eq!(wish("inputs=off").unwrap().to_string(), "inputs=off");
        assert_eq!(wish("ids=required"), Ok(Wish { layer: Layer::Ids, demand: Demand::Required }));
        for (text, why) in [
            ("ids", "it has no \"=\""),
            ("moon=off", "there is no layer \"moon\""),
            ("ids=maybe", "\"maybe\" is none of required, preferred, off"),
        ] {
            assert!(wish(text).unwrap_err().starts_with(why), "{text}");
        }
    }
}

//! One process's view of the simulated hardware.

use super::driver::SimDriver;
use super::fault::{Broken, Fault, Verb};
use super::hardware::{Disk, Hardware};
use super::probe::SimProbe;
use super::world::World;
use crate::driver::{Adopted, Capabilities, Found, Probe, Provider};
use crate::error::{Error, ErrorKind, Result};
use crate::properties::Properties;
use crate::spec::{Id, Source, Spec};
use crate::state::State;

/// Machines on a [`World`]. Several of them over one world are several processes.
#[derive(Clone, Debug)]
pub struct SimProvider {
    world: World,
    suspend: bool,
}

impl SimProvider {
    /// A provider over `world`.
    pub fn new(world: World) -> SimProvider {
        SimProvider { world, suspend: true }
    }

    /// Sets whether its machines can be suspended.
    #[must_use]
    pub fn suspendable(mut self, suspendable: bool) -> SimProvider {
        self.suspend = suspendable;
        self
    }

    /// The hardware.
    pub fn world(&self) -> &World {
        &self.world
    }

    async fn ask(&self, id: &Id, verb: Verb) -> Result<()> {
        let fault = self.world.change(|hw| {
            hw.log(verb, id);
            hw.pick(id, verb)
        });
        self.world.gate(id, verb).await;
        match fault {
            Fault::Err | Fault::ErrButDone => Err(Error::new(ErrorKind::Backend, format!("sim: {verb:?} was to fail"))),
            Fault::Hang => {
                self.world.hang().await;
                Ok(())
            }
            Fault::Slow(delay) => {
                self.world.pause(delay).await;
                Ok(())
            }
            Fault::Panic => panic!("sim: {verb:?} was to panic"),
            Fault::Ok | Fault::Lie | Fault::DieLater(_) => Ok(()),
        }
    }
}

impl Provider for SimProvider {
    type Driver = SimDriver;
    type Claim = SimClaim;

    fn capabilities(&self) -> Capabilities {
        Capabilities { suspend: self.suspend, exec: true, fork: true, adopt: true, network: true }
    }

    async fn open(&self, id: &Id, spec: &Spec) -> Result<SimDriver> {
        self.ask(id, Verb::Open).await?;
        Ok(SimDriver::new(self.world.clone(), id.clone(), spec.clone(), self.suspend))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        self.world.pause(std::time::Duration::ZERO).await;
        let seen = self.world.change(|hw| {
            hw.names()
                .into_iter()
                .filter_map(|id| find(hw, &id).map(|(state, spec)| (id, state, spec)))
                .collect::<Vec<_>>()
        });
        let found = seen.into_iter().map(|(id, state, spec)| {
            let properties = SimProbe { world: self.world.clone(), id: id.clone() }.properties();
            let problem = (state == State::ErrorUnknown).then(|| "it was left half done".to_owned());
            let properties = match &spec {
                Some(spec) => Properties { cpus: spec.cpus, memory_mib: spec.memory_mib, ..properties },
                None => properties,
            };
            Found { id, state, spec, problem, properties }
        });
        Ok(found.collect())
    }

    async fn adopt(&self, id: &Id) -> Result<Adopted<SimDriver>> {
        self.ask(id, Verb::Adopt).await?;
        let found = self.world.change(|hw| if hw.is(Broken::NeverAdopts) { None } else { find(hw, id) });
        let Some((state, spec)) = found else {
            return Err(Error::new(ErrorKind::NotFound, "there is no machine of that name").on(id.as_str()));
        };
        let spec = spec.unwrap_or_else(|| Spec::new(Source::Alias("unknown".to_owned())));
        Ok(Adopted { driver: SimDriver::new(self.world.clone(), id.clone(), spec.clone(), self.suspend), spec, state })
    }

    async fn claim(&self, name: &Id) -> Result<SimClaim> {
        self.ask(name, Verb::Claim).await?;
        let taken = self.world.change(|hw| {
            if let Some(holder) = hw.claims.get(name).copied().filter(|_| !hw.is(Broken::SharesClaims)) {
                return Err(holder);
            }
            let token = hw.number();
            hw.claims.insert(name.clone(), token);
            Ok(token)
        });
        taken.map(|token| SimClaim { world: self.world.clone(), name: name.clone(), token }).map_err(|holder| {
            let message = format!("the pool {name} is in use, by the simulated process {holder}");
            Error::new(ErrorKind::Busy, message).hint("close that pool first, or choose another name")
        })
    }
}

/// A pool's name, held; free again when it is dropped, by whatever ended its process.
#[derive(Debug)]
pub struct SimClaim {
    world: World,
    name: Id,
    token: u64,
}

impl Drop for SimClaim {
    fn drop(&mut self) {
        self.world.change(|hw| {
            if hw.claims.get(&self.name) == Some(&self.token) {
                hw.claims.remove(&self.name);
            }
        });
    }
}

fn find(hw: &mut Hardware, id: &Id) -> Option<(State, Option<Spec>)> {
    // Also a look clears up after a process that died.
    hw.recover(id);
    let state = hw.seen(id);
    let stale = hw.is(Broken::StaleList);
    let unit = hw.units.get(id)?;
    let there = unit.disk != Disk::None || unit.process.is_some();
    if unit.foreign || unit.denied || !(there || stale) {
        return None;
    }
    Some((state, unit.spec.clone()))
}
